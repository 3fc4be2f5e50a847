"""Copies of a state become one by rule, and copies that saw nothing count nowhere."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.merge import merged

NAN = float("nan")


def one(copies, weights, old, rule=None, dtype=jnp.float32):
    rules = {} if rule is None else {"a/x": rule}
    tree = merged(
        {"a": {"x": jnp.asarray(copies, dtype)}},
        jnp.asarray(weights, jnp.float32),
        {"a": {"x": jnp.asarray(old, dtype)}},
        rules,
    )
    assert tree["a"]["x"].dtype == dtype
    return np.asarray(tree["a"]["x"]).tolist()


def test_floats_take_the_weighted_mean_and_integers_the_maximum():
    assert one([1.0, 5.0], [3, 1], 0.0) == 2.0
    assert one([[1.0, 0.0], [5.0, 8.0]], [1, 1], [9.0, 9.0]) == [3.0, 4.0]
    assert one([4, 6, 5], [1, 1, 1], 3, dtype=jnp.int32) == 6
    assert one([False, True], [1, 1], False, dtype=jnp.bool_) is True


def test_max_is_the_largest():
    assert one([1.0, 5.0, 2.0], [1, 1, 9], 0.0, "max") == 5.0


def test_sum_adds_what_each_copy_added_to_the_old_state_once():
    assert one([13, 11], [1, 1], 10, "sum", jnp.int32) == 14  # not 24, which counts the old state twice
    assert one([1.5, 2.0], [2, 7], 1.0, "sum") == 2.5


@pytest.mark.parametrize("rule, expected", [("mean", 2.0), ("max", 2.0), ("sum", 2.0)])
def test_a_copy_of_no_weight_counts_nowhere_even_if_nan(rule, expected):
    assert one([2.0, NAN], [1, 0], 0.0, rule) == expected


@pytest.mark.parametrize("rule", ["mean", "max", "sum"])
def test_no_weight_at_all_keeps_the_old_state(rule):
    assert one([NAN, NAN], [0, 0], 7.0, rule) == 7.0


def test_nan_of_a_copy_with_weight_is_not_hidden():
    assert np.isnan(one([2.0, NAN], [1, 1], 0.0))


def test_a_mean_of_many_bfloat16_copies_is_taken_in_float32():
    assert one([1.0] * 512, [1] * 512, 0.0, dtype=jnp.bfloat16) == 1.0  # bfloat16 sums of ones stop at 256


@hypothesis.given(st.lists(st.tuples(st.integers(-8, 8), st.integers(0, 3)), min_size=1, max_size=6))
def test_mean_equals_numpys_weighted_average(pairs):
    values, weights = zip(*pairs, strict=True)
    expected = np.average(values, weights=weights) if sum(weights) else 5.0
    assert one(values, weights, 5.0) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "rule, dtype, said",
    [
        ("median", jnp.float32, "merge of state a/x: 'median' is unknown; allowed: mean, max, sum"),
        ("mean", jnp.int32, "merge of state a/x: int32 has no mean; allowed: max, sum"),
        (None, jnp.complex64, "state a/x: copies of complex64 cannot be merged; floats, integers and booleans can"),
    ],
)
def test_a_rule_that_cannot_be_is_refused_by_path(rule, dtype, said):
    with pytest.raises(ValueError) as error:
        one([1, 2], [1, 1], 0, rule, dtype)
    assert str(error.value) == said
