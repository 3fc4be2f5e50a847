"""Attention over a cache's slots against its definition."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import masks
from research.nn.attention_core import attend, visible

VALUES = 2e-5


def operands(b, t, s, h, k, d):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, ((b, t, h, d), (b, s, k, d), (b, s, k, d)), strict=True)]


def looped(q, k, v, seen):
    """Attention as its definition says it, in NumPy and float64, a query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    b, t, h, _ = q.shape
    out = np.zeros(q.shape)
    for i, j, head in itertools.product(range(b), range(t), range(h)):
        kv = head // (h // k.shape[2])
        scores = k[i, seen[j], kv] @ q[i, j, head] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[i, j, head] = weights @ v[i, seen[j], kv] / weights.sum()
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype, most", [("float32", VALUES), ("bfloat16", 0.05)])
def test_attending_is_the_definition(kv_heads, dtype, most):
    q, k, v = operands(2, 3, 7, 4, kv_heads, 4)
    seen = np.random.default_rng(0).random((3, 7)) < 0.6
    got = jax.jit(attend, static_argnums=4)(q, k, v, seen, dtype)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, looped(q, k, v, seen), atol=most)


def test_a_row_that_sees_nothing_is_finite():
    q, k, v = operands(1, 3, 3, 1, 1, 4)
    assert bool(jnp.isfinite(attend(q, k, v, jnp.zeros((3, 3), bool), "float32")).all())


def test_a_slot_is_visible_by_the_position_it_holds_and_never_empty():
    seen = visible(masks.window(2, 0), np.array([5, 0]), np.array([-1, 3, 5, 6, 0, 2]))
    np.testing.assert_array_equal(seen, [[False, True, True, False, False, False], [False, False, False, False, True, False]])
