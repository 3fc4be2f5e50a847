"""A step that leaves something not finite is not taken, is counted, and stops nobody else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.learners import average, gradient, population, skip_nonfinite
from tests.learners.toys import KEY, TASK, a_batch, bad_batch, close, same, started, stepped, trained

LEARNER = gradient(TASK, optax.adam(0.1))


def test_a_bad_batch_leaves_the_state_but_for_its_step():
    learner = skip_nonfinite(LEARNER)
    start, _ = trained(learner, 2)
    state, metrics = jax.jit(learner.step)(start, bad_batch(), KEY)
    assert state["step"] == 3
    same({**state, "step": start["step"]}, start)
    assert metrics["skipped"] == (1, 1) and metrics["loss"] == (0, 0) and metrics["grad_norm"] == (0, 0)


def test_good_steps_are_as_without_it():
    (plain, _), (guarded, seen) = trained(LEARNER, 3), trained(skip_nonfinite(LEARNER), 3)
    close(guarded, plain)  # to rounding: another program, other fusions
    assert [m["skipped"] for m in seen] == [(0, 1)] * 3 and all(m["loss"][0] > 0 for m in seen)


def test_training_goes_on_after_a_bad_batch():
    state, seen = trained(skip_nonfinite(LEARNER), 4, lambda i: bad_batch(i) if i == 1 else a_batch(i))
    assert [float(m["skipped"][0]) for m in seen] == [0, 1, 0, 0]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state)) and state["opt"][0].count == 3


def test_a_nan_in_the_mask_is_skipped():
    state, metrics = stepped(skip_nonfinite(LEARNER), started(LEARNER), a_batch(mask=[jnp.nan] + [1] * 7))
    same(state["params"], started(LEARNER)["params"])
    assert metrics["skipped"] == (1, 1)


def test_a_finite_loss_with_params_that_overflow_is_skipped():
    huge = skip_nonfinite(gradient(TASK, optax.sgd(3e38)))
    start = started(huge)
    state, metrics = stepped(huge, start, a_batch())
    same(state["params"], start["params"])
    assert metrics["skipped"] == (1, 1)


def test_a_number_that_was_infinite_before_is_no_reason():
    """A bound at infinity, or the best loss so far before the first."""
    bound = optax.GradientTransformation(
        lambda params: {"bound": jnp.full((), jnp.inf)}, lambda g, state, params=None: (g, state)
    )
    learner = skip_nonfinite(gradient(TASK, optax.chain(bound, optax.sgd(0.1))))
    state, seen = trained(learner, 2)
    assert [float(m["skipped"][0]) for m in seen] == [0, 0] and np.isinf(state["opt"][0]["bound"])
    assert not np.array_equal(state["params"]["linear"]["kernel"], started(learner)["params"]["linear"]["kernel"])


def test_inside_a_population_one_member_stops_alone():
    rates = {"learning_rate": (0.01, jnp.nan, 0.1)}
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    guarded = population(skip_nonfinite(gradient(TASK, tx)), 3, rates)
    state, seen = trained(guarded, 3)
    assert state["step"].shape == () and state["step"] == 3
    assert [m["skipped"][0].tolist() for m in seen] == [[0, 1, 0]] * 3
    free, _ = trained(population(gradient(TASK, tx), 3, rates), 3)
    same(
        jax.tree.map(lambda x: x[jnp.array([0, 2])], state["params"]),
        jax.tree.map(lambda x: x[jnp.array([0, 2])], free["params"]),
    )
    same(jax.tree.map(lambda x: x[1], state["params"]), jax.tree.map(lambda x: x[1], started(guarded)["params"]))


def test_it_wraps_an_average():
    learner = skip_nonfinite(average(LEARNER, 0.9))
    state, _ = trained(learner, 3, lambda i: bad_batch(i) if i == 1 else a_batch(i))
    assert state["average"]["count"] == 2
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(learner.variables(state)))
