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


def fan_in_normal(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Normal of variance 1 / fan_in, float32: keeps the variance of activations."""
    return jax.random.normal(key, shape) * fan_in**-0.5


class Linear(nnx.Module):
    """y = x W (+ b): [..., inputs] -> [..., outputs]. `axes` are the logical names of W's two dimensions. `zero` starts W at
    zero, as is done for what is added to a residual stream."""

    def __init__(self, inputs: int, outputs: int, axes: tuple[str | None, str | None], *, dtype: str, bias: bool = False,
                 zero: bool = False, rngs: nnx.Rngs):  # fmt: skip
        shape = (inputs, outputs)
        self.kernel = param(jnp.zeros(shape) if zero else fan_in_normal(rngs.params(), shape, inputs), *axes)
        self.bias = param(jnp.zeros(outputs), axes[1]) if bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1])
        y = contract("ni,io->no", rows, self.kernel[...], self.dtype).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias[...]
