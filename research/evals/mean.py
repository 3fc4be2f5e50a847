"""Exact weighted means of what is measured of each example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from research.core.types import Batch, Evaluator, Example, Key, Tree, Variables
from research.evals import _sums as sums
from research.evals._example import linear_classifier
from research.evals._values import Values, correct, nll


def mean(
    apply: sums.Apply, values: Mapping[str, Values], *, inputs: Sequence[str] = ("inputs",), mask: str = "mask"
) -> Evaluator:
    """{name: mean of values[name](outputs, batch), weighted by batch[mask]}, in one pass of the method.

    apply: such as `task.methods["predict"].apply`; it is given {name: batch[name] for name in inputs}.
    values: functions of (outputs, batch) -> [batch, ...], whose shape begins with the mask's, such as `evals.nll`.
    The means are those of all examples at once, however they are batched and padded. NaN where nothing counted.

    Raises ValueError where the batch lacks a key or the shapes do not fit.
    """
    names = sorted(values)

    def init() -> Tree:
        return {name: {"sum": sums.zero(), "weight": sums.zero()} for name in names}

    def update(stats: Tree, variables: Variables, batch: Batch, key: Key) -> Tree:
        outputs = sums.outputs(apply, inputs, variables, batch, key)
        (weights,) = sums.taken(batch, mask)
        return sums.added(stats, {name: sums.masked_sums(values[name](outputs, batch), weights) for name in names})

    def finalize(stats: Tree) -> Mapping[str, Any]:
        return sums.means(stats)

    return Evaluator(init, update, finalize)


def example() -> Example:
    task = linear_classifier()
    return Example(mean(task.methods["predict"].apply, {"nll": nll, "accuracy": correct()}), task)
