"""Whatever a task's loss measures, over a whole data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from research.core.contracts import abstract_batch, abstract_key
from research.core.types import Array, Batch, Evaluator, Example, Key, Task, Tree, Variables
from research.evals import _sums as sums
from research.evals._example import linear_classifier


def mean_of_loss(task: Task) -> Evaluator:
    """{"loss", every metric of the loss}: exact weighted means over all batches; "loss" only where it is a weighted mean.

    The loss runs as in training: dropout is on, and a batch norm takes the statistics of each batch, padding included. Where
    the network has either, measure a method, which runs in evaluation mode, by `mean`. Its new state is dropped.
    """
    variables = jax.eval_shape(task.init, abstract_key())
    _, shapes = jax.eval_shape(task.loss, variables, abstract_batch(task.batch), abstract_key())
    pairs = dict(shapes.metrics)
    if shapes.weight is not None:
        pairs = {"loss": (shapes.weight, shapes.weight), **pairs}

    def init() -> Tree:
        return {n: {"sum": sums.zero(total.shape), "weight": sums.zero(weight.shape)} for n, (total, weight) in pairs.items()}

    def measured(variables: Variables, batch: Batch, key: Key) -> dict[str, tuple[Array, Array]]:
        loss, aux = task.loss(variables, batch, key)
        found = dict(aux.metrics)
        if aux.weight is not None:
            found = {"loss": (loss * aux.weight, aux.weight), **found}
        # what counts nothing may be 0/0
        return {n: (jnp.where(weight == 0, 0.0, total), weight) for n, (total, weight) in found.items()}

    def update(stats: Tree, variables: Variables, batch: Batch, key: Key) -> Tree:
        return sums.added(stats, measured(variables, batch, key))

    def finalize(stats: Tree) -> Mapping[str, Any]:
        return sums.means(stats)

    return Evaluator(init, update, finalize)


def example() -> Example:
    task = linear_classifier()
    return Example(mean_of_loss(task), task)
