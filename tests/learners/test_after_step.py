"""`after_step` gives its function the variables after the step and the whole step's sums."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.estimates import accumulated
from research.learners import after_step, average, gradient, population
from tests.learners.toys import KEY, TASK, a_batch, close, same, started, stepped, trained

LEARNER = gradient(TASK, optax.sgd(0.1))


def halved(variables, metrics):
    return {**variables, "params": jax.tree.map(lambda p: p / 2, variables["params"])}


def test_it_sees_the_variables_after_the_update_and_the_state_after_the_loss():
    plain, _ = stepped(LEARNER, started(LEARNER), a_batch())
    changed, _ = stepped(after_step(LEARNER, halved), started(LEARNER), a_batch())
    same(changed["params"], jax.tree.map(lambda p: p / 2, plain["params"]))
    same({**changed, "params": 0}, {**plain, "params": 0})


def test_it_sees_the_sums_of_all_microbatches():
    def counting(variables, metrics):
        return {**variables, "state": {**variables["state"], "largest": metrics["squared_error"][1]}}

    learner = after_step(gradient(TASK, optax.sgd(0.1), accumulated(4)), counting)
    state, _ = jax.jit(learner.step)(started(learner), a_batch(mask=[1, 1, 1, 1, 1, 1, 0, 0]), KEY)
    assert state["state"]["largest"] == 6


def test_around_an_average_it_changes_what_is_trained():
    state, _ = trained(after_step(average(LEARNER, 0.9), halved), 1)
    plain, _ = trained(LEARNER, 1)
    close(state["params"], jax.tree.map(lambda p: p / 2, plain["params"]))


def test_inside_and_outside_a_population_a_memberwise_function_is_the_same():
    inside, outside = population(after_step(LEARNER, halved), 2), after_step(population(LEARNER, 2), halved)
    close(trained(inside, 2)[0], trained(outside, 2)[0])


@pytest.mark.parametrize(
    "fn, said",
    [
        (
            lambda v, m: {**v, "frozen": jax.tree.map(lambda x: x + 0, v["frozen"])},
            'after_step: fn changes "frozen"; expected it untouched',
        ),
        (
            lambda v, m: {**v, "params": {"linear": {**v["params"]["linear"], "bias": jnp.ones(1)}}},
            "after_step: what fn returns: params/linear/bias: expected float32[], got float32[1]",
        ),
        (lambda v, m: v["params"], "after_step: what fn returns: linear/bias: expected no such leaf"),
    ],
)
def test_a_function_that_breaks_the_variables_is_refused(fn, said):
    learner = after_step(LEARNER, fn)
    with pytest.raises(ValueError) as error:
        stepped(learner, started(learner), a_batch())
    assert str(error.value).startswith(said)


def test_a_state_without_variables_at_its_top_is_refused():
    with pytest.raises(ValueError, match="after_step: needs a State with params, state, frozen at its top, got step, frozen"):
        after_step(LEARNER._replace(axes={"step": jax.P(), "frozen": {}}), halved)


def test_the_example_keeps_weights_in_bounds():
    from research.learners.after_step import example

    learner = example().member
    start = started(learner)
    state, _ = stepped(learner, {**start, "params": jax.tree.map(lambda p: p + 5, start["params"])}, a_batch())
    assert max(np.abs(x).max() for x in jax.tree.leaves(state["params"])) <= 1
