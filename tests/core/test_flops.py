"""FLOPs are counted by hand where hand can."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from research.core.flops import count_flops, step_flops
from tests.core import toy


def test_a_product_is_two_flops_a_multiply_add():
    assert count_flops(lambda a, b: a @ b, jnp.ones((3, 4)), jnp.ones((4, 5))) == 2 * 3 * 4 * 5
    assert count_flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), jnp.ones((7, 3, 4)), jnp.ones((7, 4, 5))) == 7 * 120


def test_a_loop_counts_every_trip_and_a_cond_its_longer_branch():
    def loop(w, x):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, 6)[0]

    assert count_flops(loop, jnp.ones((4, 4)), jnp.ones((2, 4))) == 6 * 2 * 2 * 4 * 4
    branch = jax.jit(lambda p, x: jax.lax.cond(p, lambda x: x @ x, lambda x: x, x))
    assert count_flops(branch, True, jnp.ones((3, 3))) == 54


def test_a_convolution_counts_its_kernel_at_every_output():
    def conv(x, k):
        return jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert count_flops(conv, jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))) == 2 * (2 * 8 * 8 * 5) * (3 * 3 * 3)


def test_a_step_counts_forward_and_backward():
    assert step_flops(toy.learner()) == 2 * (2 * 4 * 3)  # x w, and x^T e: the gradient of x is not needed


@pytest.mark.parametrize("estimate, flops", [(None, 6 * 2 * 8**3), (pl.CostEstimate(99, 0, 0), 99)])
def test_a_pallas_kernel_counts_every_point_of_its_grid_or_what_it_says(estimate, flops):
    def body(x, out):
        out[...] = x[...] @ x[...]

    whole = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    kernel = pl.pallas_call(body, grid=(2, 3), out_shape=whole, cost_estimate=estimate)
    assert count_flops(kernel, whole) == flops


def test_a_custom_derivative_is_counted_once():
    @jax.custom_vjp
    def f(x):
        return x @ x

    f.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))
    assert count_flops(f, jnp.ones((3, 3))) == 54
    assert count_flops(jax.grad(lambda x: f(x).sum()), jnp.ones((3, 3))) == 3 * 54
