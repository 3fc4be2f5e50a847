"""Metrics are exact means whatever way what they are over was cut."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from research.core import metrics


@given(st.lists(st.tuples(st.floats(-10, 10), st.booleans()), min_size=1, max_size=12), st.integers(0, 12))
def test_a_masked_mean_is_the_same_however_the_values_are_split(items, cut):
    values, mask = (np.array(x, np.float32) for x in zip(*items, strict=True))
    whole = metrics.masked(values, mask)
    parts = [metrics.masked(values[:cut], mask[:cut]), metrics.masked(values[cut:], mask[cut:])]
    np.testing.assert_allclose(whole, np.sum([np.asarray(p) for p in parts], axis=0), atol=1e-4)


def test_what_is_masked_counts_nothing_even_if_not_finite():
    total, weight = metrics.masked(jnp.array([1.0, jnp.nan, jnp.inf]), jnp.array([1.0, 0.0, 0.0]))
    assert (float(total), float(weight)) == (1.0, 1.0)


def test_a_mean_over_nothing_is_zero():
    assert float(metrics.mean((jnp.float32(0), jnp.float32(0)))) == 0
    assert float(metrics.mean((jnp.float32(6), jnp.float32(4)))) == 1.5


def test_calls_of_different_lengths_average_by_weight():
    calls = [{"loss": (jnp.array([2.0, 4.0]), jnp.array([1.0, 1.0]))}, {"loss": (jnp.array([12.0]), jnp.array([4.0]))}]
    stacked = metrics.stack_on_host(calls)
    assert stacked["loss"][0].tolist() == [2, 4, 12]
    assert metrics.averaged(stacked)["loss"] == pytest.approx(18 / 6)


def test_members_keep_their_own_means_and_a_weight_is_shared_by_all():
    stacked = {"loss": (np.array([[2.0, 20.0], [4.0, 40.0]]), np.array([[1.0, 1.0], [1.0, 1.0]]))}
    np.testing.assert_allclose(metrics.averaged(stacked)["loss"], [3.0, 30.0])


def test_where_nothing_counted_the_mean_is_nan():
    assert np.isnan(metrics.averaged({"loss": (np.zeros(2), np.zeros(2))})["loss"])
