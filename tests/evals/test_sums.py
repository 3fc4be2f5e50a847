"""Sums that hold over millions of terms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.evals import _sums as sums


def test_a_running_sum_keeps_what_float32_would_lose():
    total = sums.plus(sums.zero(), jnp.float32(1e8))

    def add(total, x):
        return sums.plus(total, x), None

    after, _ = jax.jit(lambda t: jax.lax.scan(add, t, jnp.ones(1000)))(total)
    assert sums.value(after) == 1e8 + 1000
    plain, _ = jax.lax.scan(lambda t, x: (t + x, None), jnp.float32(1e8), jnp.ones(1000))
    assert plain == np.float32(1e8)  # what it is for


def test_a_running_sum_is_near_float64_over_many_batches():
    x = np.random.default_rng(0).uniform(0, 3, 20000).astype(np.float32)
    total, _ = jax.jit(lambda x: jax.lax.scan(lambda t, v: (sums.plus(t, v), None), sums.zero(), x))(x)
    np.testing.assert_allclose(sums.value(total), x.sum(dtype=np.float64), rtol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 7, 8, 1000])
def test_pairwise_is_the_sum_over_the_first_axis(n):
    x = np.random.default_rng(n).standard_normal((n, 3)).astype(np.float32)
    np.testing.assert_allclose(sums.pairwise(jnp.asarray(x)), x.sum(0, dtype=np.float64), rtol=1e-5, atol=1e-5)


def test_masked_values_count_exactly_nothing_and_masks_may_be_fractions():
    values = jnp.array([[1.0, 2.0], [jnp.nan, jnp.inf], [3.0, 4.0]])
    rows, weights = sums.masked_rows(values, jnp.array([1.0, 0.0, 0.5]))
    np.testing.assert_array_equal(rows, [3.0, 0.0, 3.5])
    np.testing.assert_array_equal(weights, [2.0, 0.0, 1.0])
    total, weight = sums.masked_sums(values, jnp.array([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]]))
    assert (total, weight) == (9.0, 3.0)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"values \(3, 2\) do not begin with the shape of the mask, \(2,\)"):
        sums.masked_sums(jnp.ones((3, 2)), jnp.ones(2))
