"""The share of examples whose target is among the likeliest."""

from __future__ import annotations

from collections.abc import Sequence

from research.core.types import Evaluator, Example
from research.evals._example import linear_classifier
from research.evals._sums import Apply
from research.evals._values import correct
from research.evals.mean import mean


def accuracy(apply: Apply, *, top: int = 1, inputs: Sequence[str] = ("inputs",), mask: str = "mask") -> Evaluator:
    """{"accuracy"}, or {"top5_accuracy"} for top=5: the mean, weighted by batch[mask], of whether batch["targets"], int
    [...], is among the `top` largest of the logits [..., classes] that the method gives. See `mean` for the other
    arguments.

    Raises ValueError for top below 1.
    """
    if top < 1:
        raise ValueError(f"accuracy: top={top}; allowed: 1 or more")
    name = "accuracy" if top == 1 else f"top{top}_accuracy"
    return mean(apply, {name: correct(top)}, inputs=inputs, mask=mask)


def example() -> Example:
    task = linear_classifier()
    return Example(accuracy(task.methods["predict"].apply, top=2), task)
