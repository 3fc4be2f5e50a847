"""Normalizations of single examples; statistics in float32 whatever comes in."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from research.nn.functional import Layer, param
from research.nn.linear import per_channel

EPSILON = 1e-6


def rms_normalized(x: jax.Array) -> jax.Array:
    """x / sqrt(mean(x^2) + 1e-6) over the last axis, float32 (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4)."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPSILON)


class RMSNorm(Layer):
    """`rms_normalized` times a learned scale, which begins at `start`, over [..., width]."""

    def __init__(self, width: int, *, axis: str | None = "embed", start: float = 1.0, rngs: nnx.Rngs):
        self.scale = param(jnp.full(width, start), axis)

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_normalized(x) * per_channel(self.scale[...], x)


class PlainRMSNorm(Layer):
    """`rms_normalized` without parameters."""

    def __init__(self, width: int, *, axis: str | None = "embed", rngs: nnx.Rngs):
        pass

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_normalized(x)


class LayerNorm(Layer):
    """(x - mean) / sqrt(var + 1e-6) * scale + bias over [..., width] (Ba et al. 2016, arXiv 1607.06450, eq. 4)."""

    def __init__(self, width: int, *, axis: str | None = "embed", rngs: nnx.Rngs):
        self.scale = param(jnp.ones(width), axis)
        self.bias = param(jnp.zeros(width), axis)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        return rms_normalized(centred) * per_channel(self.scale[...], x) + per_channel(self.bias[...], x)


class GroupNorm(Layer):
    """Each example's channels, in `groups` of equal size, normalized over the group and all of space: [batch, *space, channels]
    (Wu and He 2018, arXiv 1803.08494, eq. 1 and 7)."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs):
        self.scale = param(jnp.ones(channels), "channels")
        self.bias = param(jnp.zeros(channels), "channels")
        self.groups = groups

    def __call__(self, x: jax.Array) -> jax.Array:
        grouped = x.astype(jnp.float32).reshape(x.shape[0], -1, self.groups, x.shape[-1] // self.groups)
        centred = grouped - jnp.mean(grouped, axis=(1, 3), keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=(1, 3), keepdims=True)
        y = (centred * jax.lax.rsqrt(variance + EPSILON)).reshape(x.shape)
        return y * per_channel(self.scale[...], y) + per_channel(self.bias[...], y)


NORMS = {"rms": RMSNorm, "plain_rms": PlainRMSNorm, "layer": LayerNorm}
