"""What is measured of one example: functions of (outputs of a method, batch), to be averaged by `mean` or `bootstrap`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from research.core.types import Array, Batch, Tree

Values = Callable[[Tree, Batch], Array]


def nll(logits: Array, batch: Batch) -> Array:
    """-log softmax(logits)[target], nats, float32 shaped as `batch["targets"]` (int [...]; logits [..., classes])."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def correct(top: int = 1) -> Values:
    """1.0 where the target is among the `top` largest logits, else 0.0; of equal logits the first is the larger, as in
    argmax. Logits that are NaN are never correct."""

    def values(logits: Array, batch: Batch) -> Array:
        targets = batch["targets"][..., None]
        chosen = jnp.take_along_axis(logits, targets, axis=-1)
        index = jnp.arange(logits.shape[-1]).reshape((1,) * (logits.ndim - 1) + (-1,))
        above = (logits > chosen) | ((logits == chosen) & (index < targets))
        return ((above.sum(-1) < top) & ~jnp.isnan(logits).any(-1)).astype(jnp.float32)

    return values


def squared_error(predicted: Array, batch: Batch) -> Array:
    """(predicted - target)^2, element by element."""
    return jnp.square(predicted - batch["targets"])


def absolute_error(predicted: Array, batch: Batch) -> Array:
    """|predicted - target|, element by element."""
    return jnp.abs(predicted - batch["targets"])
