"""Products in a compute dtype, accumulated in float32."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def rounded(spec: str, a: jax.Array, b: jax.Array, dtype: str) -> jax.Array:
    """The einsum `spec` of two arrays rounded to `dtype`, summed in float32. Without a rule of its own for derivatives."""
    return jnp.einsum(spec, a.astype(DTYPES[dtype]), b.astype(DTYPES[dtype]), preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _contract_low(spec: str, a: jax.Array, b: jax.Array, dtype: str) -> jax.Array:
    return rounded(spec, a, b, dtype)


def _contract_low_forward(spec, a, b, dtype):
    low = a.astype(DTYPES[dtype]), b.astype(DTYPES[dtype])
    return rounded(spec, *low, dtype), low


def _contract_low_backward(spec, dtype, saved, g):
    # JAX's own rule would multiply the float32 cotangent with a bfloat16 operand, which no matrix unit does
    (left, right), out = spec.split("->")[0].split(","), spec.split("->")[1]
    a, b = saved
    return rounded(f"{out},{right}->{left}", g, b, dtype), rounded(f"{left},{out}->{right}", a, g, dtype)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul_low(x: jax.Array, kernel: jax.Array, dtype: str) -> jax.Array:
    return rounded("ni,io->no", x, kernel, dtype)


def _matmul_low_forward(x, kernel, dtype):
    low = x.astype(DTYPES[dtype]), kernel.astype(DTYPES[dtype])
    return rounded("ni,io->no", *low, dtype), low


def _matmul_low_backward(dtype, saved, g):
    x, kernel = saved
    d_x = rounded("no,io->ni", g, kernel, dtype)
    if kernel.shape[0] > kernel.shape[1]:
        return d_x, jax.lax.optimization_barrier(rounded("no,ni->oi", g, x, dtype)).T
    return d_x, rounded("ni,no->io", x, g, dtype)


_matmul_low.defvjp(_matmul_low_forward, _matmul_low_backward)


def matmul(x: jax.Array, kernel: jax.Array, dtype: str) -> jax.Array:
    """x @ kernel over the last axis: [..., inputs] x [inputs, outputs] -> float32 [..., outputs], rounded as in `contract`.

    Where the kernel narrows, it is turned round first: the gradient of a turned kernel is a product with the narrow operand on
    the left, which XLA computes a third faster on CPU. The barrier keeps it from turning the product back.
    """
    rows = x.reshape(-1, x.shape[-1])
    if dtype != "float32":
        y = _matmul_low(rows, kernel, dtype)
    elif kernel.shape[0] > kernel.shape[1]:
        y = jnp.einsum("ni,oi->no", rows, jax.lax.optimization_barrier(kernel.T))
    else:
        y = rows @ kernel
    return y.reshape(*x.shape[:-1], kernel.shape[1])
