"""A short depthwise causal convolution along the sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from research.core.types import Spec
from research.nn.functional import param


class ShortConv(nnx.Module):
    """y[t] = sum_i w[i] x[t - i], i < taps, a weight a channel: [batch, length, width] -> the same. Starts as the identity."""

    def __init__(self, width: int, taps: int, *, rngs: nnx.Rngs):
        self.kernel = param(jnp.zeros((taps, width)).at[0].set(1.0), None, "embed")
        self.taps, self.width = taps, width

    def _convolved(self, padded_BxTxC: jax.Array, length: int) -> jax.Array:
        start = self.taps - 1
        return sum(padded_BxTxC[:, start - i : start - i + length] * self.kernel[i] for i in range(self.taps))

    def __call__(self, x_BxTxC: jax.Array) -> jax.Array:
        return self._convolved(jnp.pad(x_BxTxC, [(0, 0), (self.taps - 1, 0), (0, 0)]), x_BxTxC.shape[1])

    def cache_specs(self, batch: int) -> Spec:
        """The taps - 1 inputs before the next one; zeros at first."""
        return Spec((batch, self.taps - 1, self.width), jnp.float32, ("batch", None, "embed"))

    def decode(self, x_BxTxC: jax.Array, cache: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The next T outputs, and the cache after them."""
        length = x_BxTxC.shape[1]
        padded = jnp.concatenate([cache, x_BxTxC], axis=1)
        return self._convolved(padded, length), padded[:, length:]
