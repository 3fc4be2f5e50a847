"""Schedule-free and Prodigy are optax's, with the schedule that the config gives, and what is averaged is what is evaluated."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import prodigy, schedule_free, schedule_free_eval_params

from research.core.contracts import check_learner
from research.learners import gradient, population
from research.optim import make, rates
from research.optim.scheduled import evaluated
from tests.learners.toys import TASK, a_batch, close, same, started, trained

PARAMS = {"w": jnp.asarray([1.0, -2.0, 3.0]), "b": jnp.asarray([[0.5]])}
RISING = {"name": "constant", "warmup": 4}


def grads(params, i):
    return jax.tree.map(lambda p: 0.3 * p + jnp.cos(i + p), params)


def steps(tx, n, params=PARAMS):
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(n):
        updates, state = update(grads(params, i), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def rising(count):
    return jnp.minimum(0.1, 0.1 * (count + 1) / 4)


def test_schedule_free_is_that_of_optax_around_adam_with_the_same_schedule():
    ours, state = steps(make({"name": "schedule_free", "learning_rate": 0.1, "schedule": RISING}, steps=20), 7)
    base = optax.chain(optax.scale_by_adam(0.0, 0.999), optax.scale_by_learning_rate(rising))
    theirs, their_state = steps(schedule_free(base, lambda count: rising(count - 1), 0.9), 7)
    close(ours, theirs)
    close(evaluated(state, ours), schedule_free_eval_params(their_state, theirs))
    assert np.abs(evaluated(state, ours)["w"] - ours["w"]).max() > 1e-3


def test_a_learner_gives_the_average_and_at_first_the_params():
    tx = make({"name": "schedule_free", "learning_rate": 0.05, "weight_decay": 0.1, "clip": 1.0}, steps=10)
    learner = gradient(TASK, tx)
    check_learner(learner)
    state = started(learner)
    same(learner.variables(state)["params"], state["params"])
    zs = []
    for _ in range(3):
        state, _ = trained(learner, 1, a_batch, state)
        zs.append(state["opt"][1].z["linear"]["kernel"])
    np.testing.assert_allclose(learner.variables(state)["params"]["linear"]["kernel"], np.mean(zs, axis=0), rtol=1e-4)
    same({k: learner.variables(state)[k] for k in ("state", "frozen")}, {k: state[k] for k in ("state", "frozen")})


def test_members_of_a_population_have_each_their_average():
    tx = make({"name": "schedule_free", "learning_rate": 0.05, "schedule": RISING}, steps=10)
    learner = population(gradient(TASK, tx), 2, {"learning_rate": (0.0, 0.1)})
    state, _ = trained(learner, 2)
    found = learner.variables(state)["params"]["linear"]["kernel"]
    np.testing.assert_allclose(found[0], started(learner)["params"]["linear"]["kernel"][0], rtol=1e-6)
    assert np.abs(found[1] - state["params"]["linear"]["kernel"][1]).max() > 1e-5
    np.testing.assert_allclose(rates(state["opt"])["learning_rate"], [0.0, 0.05], rtol=1e-6)


def test_prodigy_is_that_of_optax_with_the_same_schedule_and_decay():
    config = {
        "name": "prodigy",
        "learning_rate": 1.0,
        "decay": 0.01,
        "first": 1e-3,
        "schedule": {"name": "cosine", "warmup": 4},
    }
    ours, state = steps(make(config, steps=30), 12)

    def schedule(count):
        t = jnp.clip((count - 4) / 26, 0, 1)
        return jnp.where(count < 4, (count + 1) / 4, 0.5 * (1 + jnp.cos(jnp.pi * t)))

    theirs, their_state = steps(prodigy(schedule, estim_lr0=1e-3, weight_decay=0.01), 12)
    close(ours, theirs)
    assert their_state.estim_lr > 2e-3
    np.testing.assert_allclose(state[0]["prodigy"].estim_lr, their_state.estim_lr, rtol=1e-5)


def test_prodigy_keeps_its_state_wide_and_its_dtypes_where_params_are_narrow():
    """Of mixed dtypes optax's own changes the dtypes of its state at the first step, so that no loop of steps compiles."""
    params = {"w": jnp.ones((2, 3)), "half": jnp.ones(3, jnp.bfloat16)}
    tx = make({"name": "prodigy", "learning_rate": 1.0}, steps=10)
    state = jax.eval_shape(tx.init, params)
    after = jax.eval_shape(tx.update, params, state, params)[1]
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}


def test_clipping_comes_before_what_prodigy_sees():
    config = {"name": "prodigy", "learning_rate": 1.0, "first": 1e-3, "clip": 1e-3}
    ours, _ = steps(make(config, steps=30), 5)
    theirs, _ = steps(optax.chain(optax.clip_by_global_norm(1e-3), prodigy(1.0, estim_lr0=1e-3)), 5)
    close(ours, theirs)


@pytest.mark.parametrize("name", ["adamw", "muon", "soap", "shampoo", "psgd_kron"])
def test_of_other_optimizers_the_params_are_what_is_evaluated(name):
    params = {"w": jnp.ones((3, 4))}
    state = jax.eval_shape(make({"name": name, "learning_rate": 0.1}, steps=10).init, params)
    assert evaluated(state, params) is params
