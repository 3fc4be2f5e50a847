"""Several evaluators in one pass over the batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from research.core.types import Batch, Evaluator, Example, Key, Tree, Variables
from research.evals._example import linear_classifier
from research.evals.accuracy import accuracy
from research.evals.bits_per_byte import bits_per_byte


def collect(evaluators: Mapping[str, Evaluator], *, prefix: bool = False) -> Evaluator:
    """All values of all of them, under their own names, or with `prefix` under "<key>/<name>". They see the same batches
    and keys; what they compute alike, such as a method's outputs, XLA computes once.

    Each must take empty stats in `finalize`, as all of `research.evals` do: NaN where nothing counted.

    Raises ValueError: none given, or two evaluators that give one name.
    """
    if not evaluators:
        raise ValueError("collect: no evaluator was given")
    keys = sorted(evaluators)

    def init() -> Tree:
        return {k: evaluators[k].init() for k in keys}

    def update(stats: Tree, variables: Variables, batch: Batch, key: Key) -> Tree:
        return {k: evaluators[k].update(stats[k], variables, batch, key) for k in keys}

    def finalize(stats: Tree) -> Mapping[str, Any]:
        out: dict[str, Any] = {}
        owner: dict[str, str] = {}
        for k in keys:
            for name, value in evaluators[k].finalize(stats[k]).items():
                name = f"{k}/{name}" if prefix else name
                if name in owner:
                    raise ValueError(f"collect: {owner[name]!r} and {k!r} both give {name!r}; allowed with prefix=True")
                owner[name], out[name] = k, value
        return out

    finalize(jax.device_get(init()))  # names that collide are told now, not after hours of training
    return Evaluator(init, update, finalize)


def example() -> Example:
    task = linear_classifier()
    predict = task.methods["predict"].apply
    return Example(collect({"accuracy": accuracy(predict), "compression": bits_per_byte(predict)}), task)
