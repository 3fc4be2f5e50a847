"""Linear layers, and how kernels start."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from research.nn.functional import Layer, param
from research.nn.products import matmul


def per_channel(values_C: jax.Array, x: jax.Array) -> jax.Array:
    """`values_C`, one a channel, with the rank of `x`, whose last axis is the channels."""
    return values_C.reshape((1,) * (x.ndim - 1) + values_C.shape)


def normal(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    return jax.random.normal(key, shape) * fan_in**-0.5


def he_normal(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    return jax.random.normal(key, shape) * (2 / fan_in) ** 0.5


def uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) * fan_in**-0.5


def zeros(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    return jnp.zeros(shape)


# How a kernel starts, float32, by its number of inputs an output. normal: variance 1 / fan_in. he_normal: 2 / fan_in (He et al.
# 2015, arXiv 1502.01852, eq. 10). uniform: within 1 / sqrt(fan_in), which is PyTorch's default.
KERNELS = {"normal": normal, "he_normal": he_normal, "uniform": uniform, "zeros": zeros}
# How a bias starts: as PyTorch's does where the kernel does, else at zero.
BIASES = {"normal": zeros, "he_normal": zeros, "uniform": uniform, "zeros": zeros}


class Linear(Layer):
    """y = x W (+ b): [..., inputs] -> [..., outputs]. `axes`: the logical names of W's dimensions. `init`: a name in KERNELS;
    zeros for what is added to a residual stream."""

    def __init__(self, inputs: int, outputs: int, axes: tuple[str | None, str | None], *, dtype: str, bias: bool = False,
                 init: str = "normal", rngs: nnx.Rngs):  # fmt: skip
        self.kernel = param(KERNELS[init](rngs.params(), (inputs, outputs), inputs), *axes)
        self.bias = param(BIASES[init](rngs.params(), (outputs,), inputs), axes[1]) if bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        y = matmul(x, self.kernel[...], self.dtype)
        return y if self.bias is None else y + per_channel(self.bias[...], y)
