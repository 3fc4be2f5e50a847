"""The first value that is not finite is found inside calls, loops and derivatives."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from research.core.nonfinite import first_nonfinite


def test_all_finite_is_none_and_minus_infinity_is_a_mask():
    assert first_nonfinite(lambda x: jax.nn.softmax(jnp.where(x > 0, x, -jnp.inf)), jnp.array([1.0, -1.0])) is None


def test_an_input_is_named_by_its_path():
    assert first_nonfinite(lambda d: d["a"]["b"].sum(), {"a": {"b": jnp.array([1.0, jnp.nan])}}) == "NaN in the input a/b"


def test_the_equation_and_its_line_are_named():
    found = first_nonfinite(lambda x: jnp.sum(jnp.log(x) + 1), jnp.array([1.0, -1.0]))
    assert found.startswith("NaN from log") and "test_nonfinite.py:" in found


def test_a_loop_says_which_iteration():
    def body(carry, i):
        return jnp.log(carry - i), carry

    found = first_nonfinite(lambda x: jax.lax.scan(body, x, jnp.arange(4.0))[0].sum(), jnp.array([2.0, 2.5]))
    assert found.startswith("NaN from iteration 1: log")


def test_a_derivative_and_a_named_scope_are_looked_into():
    def f(x):
        with jax.named_scope("layer7"):
            return jnp.sqrt(jax.nn.relu(x)).sum()

    found = first_nonfinite(jax.jit(jax.grad(f)), jnp.array([2.0, -2.5]))
    assert "infinity from div" in found and "layer7" in found


def test_custom_derivatives_conditionals_and_loops_are_run():
    @jax.custom_vjp
    def f(x):
        return x

    f.defvjp(lambda x: (x, None), lambda _, g: (g / 0.0,))

    def g(x):
        x = jax.lax.cond(x.sum() > 0, lambda y: y * 2, lambda y: y, x)
        return jax.lax.fori_loop(0, 3, lambda i, y: y + f(x), x).sum()

    assert first_nonfinite(g, jnp.ones(2)) is None
    assert "infinity from" in first_nonfinite(jax.grad(lambda x: f(x).sum()), jnp.ones(2))


def test_a_constant_that_is_nan_on_purpose_is_not_named():
    def f(x):
        return jnp.where(x > 0, x, jax.jit(lambda: jnp.full(2, jnp.nan))())

    assert first_nonfinite(f, jnp.ones(2)) is None
