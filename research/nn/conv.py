"""Convolutions: short causal ones along a sequence, and those of images and series."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from research.core.types import Spec
from research.nn.functional import Layer, param
from research.nn.linear import BIASES, KERNELS, per_channel
from research.nn.products import DTYPES, matmul


class ShortConv(Layer):
    """y[t] = sum_i w[i] x[t - i], i < taps, a weight a channel: [batch, length, width] -> the same. Starts as the identity."""

    def __init__(self, width: int, taps: int, *, rngs: nnx.Rngs):
        self.kernel = param(jnp.zeros((taps, width)).at[0].set(1.0), None, "embed")
        self.taps, self.width = taps, width

    def _convolved(self, padded_BxTxC: jax.Array, length: int) -> jax.Array:
        start = self.taps - 1
        taps = [per_channel(self.kernel[i], padded_BxTxC) for i in range(self.taps)]
        return sum(padded_BxTxC[:, start - i : start - i + length] * tap for i, tap in enumerate(taps))

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


class Conv(Layer):
    """A convolution over one or two axes: [batch, *space, inputs] -> [batch, *space', outputs].

    window, stride and padding are the same along every axis; padding is positions added at both ends. `init`: see `nn.linear`.
    implementation: "lax" is XLA's convolution; "patches" is one product of gathered patches, which stays a matrix product when
    vmapped over kernels (XLA would make that a grouped convolution, slow on CPU). Both compute the same function.
    """

    def __init__(self, inputs: int, outputs: int, *, space: int, window: int, stride: int, padding: int, bias: bool, init: str,
                 dtype: str, implementation: str, rngs: nnx.Rngs):  # fmt: skip
        names = (None,) * space + ("channels_in", "channels")
        fan_in = window**space * inputs
        self.kernel = param(KERNELS[init](rngs.params(), (window,) * space + (inputs, outputs), fan_in), *names)
        self.bias = param(BIASES[init](rngs.params(), (outputs,), fan_in), "channels") if bias else None
        self.stride, self.padding, self.dtype, self.implementation = stride, padding, dtype, implementation

    def __call__(self, x: jax.Array) -> jax.Array:
        y = CONVOLUTIONS[self.implementation](x, self.kernel[...], self.stride, self.padding, self.dtype)
        return y if self.bias is None else y + per_channel(self.bias[...], y)


def _lax(x: jax.Array, kernel: jax.Array, stride: int, padding: int, dtype: str) -> jax.Array:
    space = x.ndim - 2
    letters = "HW"[:space]
    low = DTYPES[dtype]
    return jax.lax.conv_general_dilated(
        x.astype(low),
        kernel.astype(low),
        (stride,) * space,
        [(padding, padding)] * space,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
    ).astype(jnp.float32)


def _patches(x: jax.Array, kernel: jax.Array, stride: int, padding: int, dtype: str) -> jax.Array:
    space, window = x.ndim - 2, kernel.shape[0]
    padded = jnp.pad(x, [(0, 0), *[(padding, padding)] * space, (0, 0)])
    counts = [(size - window) // stride + 1 for size in padded.shape[1:-1]]
    gathered = []
    for offset in itertools.product(range(window), repeat=space):
        place = tuple(slice(o, o + (n - 1) * stride + 1, stride) for o, n in zip(offset, counts, strict=True))
        gathered.append(padded[(slice(None), *place)])
    rows = jnp.concatenate(gathered, axis=-1).reshape(-1, window**space * x.shape[-1])
    y = matmul(rows, kernel.reshape(-1, kernel.shape[-1]), dtype)
    return y.reshape(x.shape[0], *counts, -1)


CONVOLUTIONS = {"lax": _lax, "patches": _patches}
