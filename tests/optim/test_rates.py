"""Weight decay, learning rate and schedule as leaves of the state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.optim.groups import groups
from research.optim.rates import rates, scale_by_rates
from research.optim.schedules import linear

PARAMS = {"a": {"kernel": jnp.array([1.0, -2.0])}, "b": {"bias": jnp.array([3.0])}}
GRADS = {"a": {"kernel": jnp.array([0.5, 0.25])}, "b": {"bias": jnp.array([-1.0])}}


def made(**own):
    return scale_by_rates(0.1, 0.01, linear(1.0, 4), groups({"b": {"match": "bias", **own}}))


def test_the_update_is_the_formula_of_each_group_at_each_step():
    tx = made(learning_rate=0.2, weight_decay=0.0)
    state = tx.init(PARAMS)
    for step in range(5):
        factor = max(0.0, 1 - step / 4)
        updates, state = tx.update(GRADS, state, PARAMS)
        kernel = -0.1 * factor * (np.array([0.5, 0.25]) + 0.01 * np.array([1.0, -2.0]))
        np.testing.assert_allclose(updates["a"]["kernel"], kernel, rtol=1e-6)
        np.testing.assert_allclose(updates["b"]["bias"], [0.2 * factor], rtol=1e-6)
        assert state["count"] == step + 1 and state["factor"] == factor


def test_a_factor_follows_the_varied_learning_rate_and_an_own_rate_does_not():
    for own, expected in ({"factor": 0.5}, 5.0), ({"learning_rate": 0.2}, 0.2):
        tx = made(**own, weight_decay=0.0)
        state = {**tx.init(PARAMS), "learning_rate": jnp.float32(10.0)}
        np.testing.assert_allclose(tx.update(GRADS, state, PARAMS)[0]["b"]["bias"], [expected], rtol=1e-6)


def test_leaves_are_float32_scalars_with_names_of_their_own():
    state = made(learning_rate=0.2, weight_decay=0.5).init(PARAMS)
    shapes = {name: (leaf.shape, str(leaf.dtype)) for name, leaf in state.items()}
    assert shapes.pop("count") == ((), "int32")
    assert set(shapes) == {"factor", "learning_rate", "learning_rate_b", "weight_decay", "weight_decay_b"}
    assert set(shapes.values()) == {((), "float32")}


def test_a_population_varies_the_rate_while_the_schedule_runs():
    tx = made(factor=1.0)
    varied = {**tx.init(PARAMS), "learning_rate": jnp.array([0.1, 1.0])}
    inside = jax.tree.map(lambda x: 0 if x.ndim else None, varied)
    outside = jax.tree.map(lambda x: 0, varied)
    _, once = jax.vmap(tx.update, (None, inside, None), (0, outside))(GRADS, varied, PARAMS)
    updates, twice = jax.vmap(tx.update, (None, 0, None))(GRADS, once, PARAMS)
    for i, rate in enumerate((0.1, 1.0)):
        alone = {**tx.init(PARAMS), "learning_rate": jnp.float32(rate), "count": jnp.int32(1)}
        np.testing.assert_allclose(updates["a"]["kernel"][i], tx.update(GRADS, alone, PARAMS)[0]["a"]["kernel"], rtol=1e-6)
    np.testing.assert_allclose(rates(twice)["learning_rate"], [0.075, 0.75], rtol=1e-6)


def test_rates_are_those_of_the_last_update():
    tx = made(learning_rate=0.2, weight_decay=0.5)
    state = {"opt": (tx.init(PARAMS),)}
    for _ in range(3):
        state = {"opt": (tx.update(GRADS, state["opt"][0], PARAMS)[1],)}
    found = rates(state)
    expected = {"learning_rate": 0.05, "learning_rate_b": 0.1, "weight_decay": 0.01, "weight_decay_b": 0.5}
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[k] for k in expected], list(expected.values()), rtol=1e-6)


def test_rates_of_several_optimizers_are_named_by_path():
    tx = scale_by_rates(0.1, 0.0, linear(1.0, 4))
    found = rates({"generator": tx.init(PARAMS), "discriminator": tx.init(PARAMS)})
    assert set(found) == {f"{p}/{k}" for p in ("generator", "discriminator") for k in ("learning_rate", "weight_decay")}


def test_params_are_required():
    tx = made(factor=1.0)
    with pytest.raises(ValueError, match="update needs params"):
        tx.update(GRADS, tx.init(PARAMS))
