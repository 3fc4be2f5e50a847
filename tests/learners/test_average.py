"""`average` gives the bias-corrected moving average, and trains what it averages."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core import contracts
from research.learners import average, forward, gradient, population
from tests.learners.toys import KEY, TASK, a_batch, close, same, started, trained

LEARNER = gradient(TASK, optax.sgd(0.1))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.99999])
def test_variables_are_the_weighted_mean_of_the_params_so_far(decay):
    learner, kernels = average(LEARNER, decay), []
    state = started(learner)
    step = jax.jit(learner.step)
    for i in range(4):
        state, _ = step(state, a_batch(i), KEY)
        kernels.append(np.asarray(state["params"]["linear"]["kernel"], np.float64))
    weights = decay ** np.arange(3.0, -1, -1)
    # 1 - 0.99999^4 is 4e-5, and float32 holds decay itself to 6e-8: a relative 6e-3 of (1 - decay), in every term alike
    close(
        learner.variables(state)["params"]["linear"]["kernel"],
        np.average(kernels, axis=0, weights=weights),
        1e-2 if decay > 0.999 else 1e-5,
    )


def test_training_is_not_changed_and_state_is_the_last():
    (plain, _), (averaged, _) = trained(LEARNER, 3), trained(average(LEARNER, 0.9), 3)
    same({k: averaged[k] for k in plain}, plain)
    same(average(LEARNER, 0.9).variables(averaged)["state"], plain["state"])


def test_before_the_first_step_they_are_the_params():
    learner = average(LEARNER, 0.9)
    same(learner.variables(started(learner)), LEARNER.variables(started(LEARNER)))
    given = jax.tree.map(lambda x: x + 1, LEARNER.variables(started(LEARNER)))
    same(learner.variables(learner.init(KEY, given)), given)


def test_bfloat16_params_are_averaged_in_float32():
    task = TASK._replace(
        init=lambda key: {**TASK.init(key), "params": jax.tree.map(lambda p: p.astype(jnp.bfloat16), TASK.init(key)["params"])}
    )
    learner = average(gradient(task, optax.sgd(0.1)), 0.9)
    contracts.check_learner(learner)
    state = started(learner)
    assert state["average"]["params"]["linear"]["kernel"].dtype == jnp.float32
    assert learner.variables(state)["params"]["linear"]["kernel"].dtype == jnp.bfloat16


def test_it_averages_a_population_as_it_averages_its_members():
    outside, inside = average(population(LEARNER, 2), 0.8), population(average(LEARNER, 0.8), 2)
    a, b = trained(outside, 3)[0], trained(inside, 3)[0]
    close(outside.variables(a), inside.variables(b))


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match="average: decay=.*; allowed: 0 or more, below 1"):
        average(LEARNER, decay)


def test_a_second_average_and_a_state_without_params_are_refused():
    with pytest.raises(ValueError, match='average: needs a State with "params" and no "average" at its top, got step, params'):
        average(average(LEARNER, 0.9), 0.9)
    bare = forward(TASK)._replace(axes={"step": jax.P(), "frozen": {}})
    with pytest.raises(ValueError, match="got step, frozen"):
        average(bare, 0.9)
