"""Normalizations over the last axis; statistics in float32 whatever comes in."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from research.nn.functional import param

EPSILON = 1e-6


def rms_normalized(x: jax.Array) -> jax.Array:
    """x / sqrt(mean(x^2) + 1e-6) over the last axis, float32 (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4)."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPSILON)


class RMSNorm(nnx.Module):
    """`rms_normalized` times a learned scale, over [..., width]."""

    def __init__(self, width: int, *, axis: str | None = "embed", rngs: nnx.Rngs):
        self.scale = param(jnp.ones(width), axis)

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_normalized(x) * self.scale[...]


class PlainRMSNorm(nnx.Module):
    """`rms_normalized` without parameters."""

    def __init__(self, width: int, *, axis: str | None = "embed", rngs: nnx.Rngs):
        pass

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_normalized(x)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + 1e-6) * scale + bias over [..., width] (Ba et al. 2016, arXiv 1607.06450, eq. 4)."""

    def __init__(self, width: int, *, axis: str | None = "embed", rngs: nnx.Rngs):
        self.scale = param(jnp.ones(width), axis)
        self.bias = param(jnp.zeros(width), axis)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        return rms_normalized(centred) * self.scale[...] + self.bias[...]


NORMS = {"rms": RMSNorm, "plain_rms": PlainRMSNorm, "layer": LayerNorm}
