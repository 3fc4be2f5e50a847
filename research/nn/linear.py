"""Products of activations with parameters, in a compute dtype, accumulated in float32."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from research.nn.functional import param

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _contract_low(spec: str, a: jax.Array, b: jax.Array, dtype: str) -> jax.Array:
    return jnp.einsum(spec, a.astype(DTYPES[dtype]), b.astype(DTYPES[dtype]), preferred_element_type=jnp.float32)


def _contract_low_forward(spec, a, b, dtype):
    low = a.astype(DTYPES[dtype]), b.astype(DTYPES[dtype])
    return jnp.einsum(spec, *low, preferred_element_type=jnp.float32), low


def _contract_low_backward(spec, dtype, saved, g):
    # JAX's own rule would multiply the float32 cotangent with a bfloat16 operand, which no matrix unit does
    (left, right), out = spec.split("->")[0].split(","), spec.split("->")[1]
    a, b = saved
    g = g.astype(DTYPES[dtype])
    return (
        jnp.einsum(f"{out},{right}->{left}", g, b, preferred_element_type=jnp.float32),
        jnp.einsum(f"{left},{out}->{right}", a, g, preferred_element_type=jnp.float32),
    )


_contract_low.defvjp(_contract_low_forward, _contract_low_backward)


def contract(spec: str, a: jax.Array, b: jax.Array, dtype: str) -> jax.Array:
    """The einsum `spec` of two float32 arrays; operands (and, backward, cotangents) rounded to `dtype`, sums and result
    float32.

    `spec` is "ab,bc->ac"-like: two operands, no ellipsis, every index in two of the three terms or in all. In bfloat16 it has
    no forward-mode derivative (jax.jvp); reverse over reverse works.
    """
    if dtype == "float32":
        return jnp.einsum(spec, a, b)
    return _contract_low(spec, a, b, dtype)


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


class Linear(nnx.Module):
    """y = x W (+ b): [..., inputs] -> [..., outputs]. `axes`: the logical names of W's dimensions. `init`: a name in KERNELS;
    zeros for what is added to a residual stream."""

    def __init__(self, inputs: int, outputs: int, axes: tuple[str | None, str | None], *, dtype: str, bias: bool = False,
                 init: str = "normal", rngs: nnx.Rngs):  # fmt: skip
        self.kernel = param(KERNELS[init](rngs.params(), (inputs, outputs), inputs), *axes)
        self.bias = param(BIASES[init](rngs.params(), (outputs,), inputs), axes[1]) if bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1])
        y = contract("ni,io->no", rows, self.kernel[...], self.dtype).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias[...]
