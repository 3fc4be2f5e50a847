"""Attention by blocks computes what the plain formula does."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from research.nn.attention_core import attend, blockwise, dense, dot_product_attention, visible

VALUES, GRADIENTS = 2e-5, 1e-4


@functools.partial(jax.jit, static_argnames=("run", "causal", "window", "dtype"))
def compiled(run, q, k, v, causal, window, dtype="float32"):
    return run(q, k, v, causal, window, dtype)


def operands(b, t, h, k, d, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = ((b, t, h, d), (b, t, k, d), (b, t, k, d), (b, t, h, d))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def looped(q, k, v, causal, window):
    """Attention as its definition says it, in NumPy and float64, a query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    b, t, h, d = q.shape
    out = np.zeros(q.shape)
    for i, j, head in itertools.product(range(b), range(t), range(h)):
        seen = [
            s for s in range(t)
            if not (causal and s > j) and not (window is not None and abs(j - s) >= window)
        ]  # fmt: skip
        kv = head // (h // k.shape[2])
        scores = k[i, seen, kv] @ q[i, j, head] / np.sqrt(d)
        weights = np.exp(scores - scores.max())
        out[i, j, head] = weights @ v[i, seen, kv] / weights.sum()
    return out


@pytest.mark.parametrize("causal, window", [(True, None), (True, 3), (False, None), (False, 2)])
def test_dense_is_the_definition(causal, window):
    q, k, v, _ = operands(2, 7, 4, 2, 4)
    got = compiled(dense, q, k, v, causal, window)
    np.testing.assert_allclose(got, looped(q, k, v, causal, window), atol=VALUES)


CASES = [(200, None, True), (200, None, False), (300, 150, True), (43, 8, True), (43, 8, False), (5, 8, True)]


@pytest.mark.parametrize("length, window, causal", CASES)
def test_blockwise_equals_dense_in_values_and_gradients(length, window, causal):
    q, k, v, weights = operands(2, length, 4, 2, 8)

    def both(run):
        def loss(q, k, v):
            out = run(q, k, v, causal, window, "float32")
            return jnp.sum(out * weights), out

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    ((_, expected), expected_grads), ((_, got), grads) = both(dense), both(blockwise)
    np.testing.assert_allclose(got, expected, atol=VALUES)
    for name, a, b in zip("qkv", grads, expected_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=GRADIENTS, err_msg=name)


@pytest.mark.parametrize("window", [None, 8])
def test_blockwise_is_the_same_under_a_mesh_and_under_vmap(window):
    q, k, v, _ = operands(2, 150, 4, 2, 8)
    expected = compiled(dense, q, k, v, True, window)
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))):
        got = jax.jit(lambda *qkv: blockwise(*qkv, True, window, "float32"))(q, k, v)
    np.testing.assert_allclose(got, expected, atol=VALUES)
    stacked = [jnp.stack([x, 2 * x]) for x in (q, k, v)]
    both = jax.jit(jax.vmap(lambda *qkv: blockwise(*qkv, True, window, "float32")))(*stacked)
    np.testing.assert_allclose(both[0], expected, atol=VALUES)


@pytest.mark.parametrize("run", [dense, blockwise])
def test_bfloat16_is_near_float32(run):
    q, k, v, _ = operands(2, 140, 4, 2, 8)
    exact = compiled(dense, q, k, v, True, None)
    got = compiled(run, q, k, v, True, None, "bfloat16")
    assert got.dtype == jnp.float32
    assert 1e-6 < float(jnp.abs(got - exact).max()) < 0.03


@pytest.mark.parametrize("window", [None, 8])
def test_blocks_round_no_more_than_the_plain_formula_does(window):
    q, k, v, weights = operands(2, 140, 4, 2, 16)

    def gradients(run, dtype):
        return jax.jit(jax.grad(lambda *qkv: jnp.sum(run(*qkv, True, window, dtype) * weights), (0, 1, 2)))(q, k, v)

    exact, plain, blocks = gradients(dense, "float32"), gradients(dense, "bfloat16"), gradients(blockwise, "bfloat16")
    for e, p, b in zip(exact, plain, blocks, strict=True):
        assert float(jnp.abs(b - e).max()) <= 2 * float(jnp.abs(p - e).max())


def test_later_tokens_change_nothing_before_them():
    q, k, v, _ = operands(1, 140, 2, 2, 8)
    for window in (None, 8):
        before = compiled(blockwise, q, k, v, True, window)[:, :100]
        changed = compiled(blockwise, q, k.at[:, 100:].add(5.0), v.at[:, 100:].add(5.0), True, window)[:, :100]
        np.testing.assert_array_equal(before, changed)


def test_a_row_that_sees_nothing_is_finite():
    q, k, v, _ = operands(1, 3, 1, 1, 4)
    assert bool(jnp.isfinite(attend(q, k, v, jnp.zeros((3, 3), bool), "float32")).all())


def test_empty_slots_are_never_visible():
    seen = visible(np.array([5]), np.array([-1, 3, 5, 6]), True, 3)
    np.testing.assert_array_equal(seen, [[False, True, True, False]])


def test_an_unknown_implementation_is_refused_with_the_nearest():
    q, k, v, _ = operands(1, 3, 1, 1, 4)
    with pytest.raises(ValueError, match=r"^attention='blokwise' is unknown; allowed: blockwise, dense; nearest: 'blockwise'$"):
        dot_product_attention(q, k, v, causal=True, window=None, dtype="float32", implementation="blokwise")
