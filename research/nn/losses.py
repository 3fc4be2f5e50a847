"""Losses from logits, per example or token; the mean over what counts is the task's."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cross_entropy(
    logits: jax.Array, targets: jax.Array, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """(loss, nll), float32 in nats, shaped as `targets` (int32 [...]; logits [..., classes]).

    nll = logsumexp(logits) - logits[target]. loss adds what only training wants: targets mixed with the uniform distribution by
    `label_smoothing` (Szegedy et al. 2016, arXiv 1512.00567, section 7), and `z_loss` x logsumexp^2, which keeps the normalizer
    near 1 (Chowdhery et al. 2022, arXiv 2204.02311, section 5).
    """
    logits = logits.astype(jnp.float32)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    nll = normalizer - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = nll
    if label_smoothing:
        loss = (1 - label_smoothing) * nll + label_smoothing * (normalizer - jnp.mean(logits, axis=-1))
    if z_loss:
        loss = loss + z_loss * jnp.square(normalizer)
    return loss, nll
