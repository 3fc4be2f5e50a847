"""What tasks with targets share: a masked mean of a loss per example, or per token."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax

from research.core import metrics
from research.core.types import Array, Aux, Batch
from research.nn.functional import Functional

PerExample = Callable[[Array, Batch], tuple[Array, Mapping[str, Array]]]


def masked_loss(model: Functional, per_example: PerExample):
    """`Task.loss` from per_example(outputs, batch) -> (losses, {metric: values}), all shaped as batch["mask"]. Aux.weight is
    the sum of the mask; the loss of a batch that is masked altogether is 0."""

    def loss(variables, batch, key):
        outputs, state = model.apply(variables, batch["inputs"], key=key, train=True)
        losses, measured = per_example(outputs, batch)
        pair = metrics.masked(losses, batch["mask"])
        pairs = {name: metrics.masked(values, batch["mask"]) for name, values in measured.items()}
        return metrics.mean(pair), Aux(state, jax.lax.stop_gradient(pairs), pair[1])

    return loss


def predicting(model: Functional, method: str = "__call__"):
    """`Method.apply` of the model in evaluation mode on {"inputs"}."""

    def apply(variables, inputs, key):
        return model.apply(variables, inputs["inputs"], key=key, method=method)[0]

    return apply
