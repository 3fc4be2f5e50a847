"""One pass of an evaluator over its batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from research.core.batches import prefetched
from research.core.mesh import Layout
from research.core.placement import onto, replicated, settled
from research.core.types import Batch, Evaluation, Evaluator, Key, Variables


def evaluator_run(evaluation: Evaluation, layout: Layout | None = None) -> Callable[[Variables, Key], Mapping[str, Any]]:
    """(variables, key) -> {name: value}: every batch once, compiled at the first call and kept. Batch i is given
    `fold_in(key, i)`. Raises ValueError where there is no batch."""
    evaluator, batches, _ = evaluation
    update = jax.jit(evaluator.update, donate_argnums=0, out_shardings=None if layout is None else layout.replicated)

    def put(batch: Batch) -> Batch:
        return jax.device_put(batch) if layout is None else onto(batch, layout.replicated)

    def run(variables: Variables, key: Key) -> Mapping[str, Any]:
        stats, count = jax.tree.map(jax.numpy.asarray, evaluator.init()), 0
        if layout is not None:
            stats, variables = replicated((stats, variables), layout)
        drawn = prefetched(put(batch) for batch in iter(batches.open()))
        try:
            for count, batch in enumerate(drawn, 1):
                stats = update(stats, variables, batch, jax.random.fold_in(key, count - 1))
                settled(stats, layout)
        finally:
            drawn.close()
        if not count:
            raise ValueError(f"nothing to evaluate on: {batches.fingerprint} gives no batch")
        return evaluator.finalize(jax.device_get(stats))

    return run


def names_of(evaluator: Evaluator) -> list[str]:
    """The names of what it measures, as it gives them on no data."""
    return list(evaluator.finalize(jax.device_get(jax.tree.map(jax.numpy.asarray, evaluator.init()))))
