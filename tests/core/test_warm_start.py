"""Starting from another run's variables: what fits is taken, and what does not is told."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from research.core.warm_start import matched, warm_start


def variables(**params):
    return {"params": params, "state": {}, "frozen": {}}


def test_leaves_are_matched_by_path_and_shape_and_the_rest_is_listed():
    initial = variables(a={"w": jnp.zeros((2, 2))}, head=jnp.zeros(3))
    loaded = variables(a={"w": np.ones((2, 2))}, head=np.ones(4), extra=np.ones(1))
    found = matched(initial, loaded)
    assert found.taken == ["params/a/w"] and found.kept == ["params/head"]
    assert set(found.unused) == {"params/head", "params/extra"} and "shape (4,), wanted (3,)" in str(found)
    np.testing.assert_array_equal(found.variables["params"]["a"]["w"], 1)
    np.testing.assert_array_equal(found.variables["params"]["head"], 0)


def test_renaming_is_by_regular_expression_in_order():
    found = matched(
        variables(body={"w": jnp.zeros(2)}), variables(old={"w": np.ones(2)}), [("/old/", "/new/"), ("/new/", "/body/")]
    )
    assert found.taken == ["params/body/w"] and not found.kept


def test_dtypes_become_the_initial_ones():
    found = matched(variables(w=jnp.zeros(2, jnp.bfloat16)), variables(w=np.ones(2, np.float32)))
    assert found.variables["params"]["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "loaded, rename, says",
    [
        (variables(w=np.ones(2)), [("/nothing/", "/w/")], "rename '/nothing/' matches no path"),
        (variables(w=np.ones(2), v=np.ones(2)), [("params/v", "params/w")], "two arrays are renamed to params/w"),
        (variables(v=np.ones(2)), [], "none of 1 arrays fits"),
    ],
)
def test_what_cannot_be_meant_is_refused(loaded, rename, says):
    with pytest.raises(ValueError, match=says):
        matched(variables(w=jnp.zeros(2)), loaded, rename)


def test_an_enter_tells_what_it_took():
    told = []
    enter = warm_start(lambda key: variables(w=jnp.zeros(2)), lambda: variables(w=np.ones(2)), told.append)
    np.testing.assert_array_equal(enter(None, None)["params"]["w"], 1)
    assert told[0].startswith("warm start: 1 arrays taken")
