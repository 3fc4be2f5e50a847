"""`lookahead` is the paper's algorithm 1 around any learner."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core import contracts
from research.learners import forward, gradient, lookahead, population
from tests.learners.toys import KEY, TASK, a_batch, close, same, started, trained

LEARNER = gradient(TASK, optax.sgd(0.1, momentum=0.9))


def by_hand(steps, every, alpha):
    """Slow and fast weights by the algorithm, with the learner's own steps between."""
    step = jax.jit(LEARNER.step)
    state = started(LEARNER)
    slow = jax.tree.map(np.asarray, state["params"])
    for t in range(steps):
        state, _ = step(state, a_batch(t), KEY)
        if t % every == every - 1:
            slow = jax.tree.map(lambda s, p: s + alpha * (np.asarray(p) - s), slow, state["params"])
            state = {**state, "params": jax.tree.map(jnp.asarray, slow)}
    return slow, state


@pytest.mark.parametrize("steps", [2, 3, 7])
def test_slow_and_fast_weights_are_those_of_the_algorithm(steps):
    learner = lookahead(LEARNER, 3, 0.4)
    found, _ = trained(learner, steps)
    slow, state = by_hand(steps, 3, 0.4)
    close(learner.variables(found)["params"], slow)
    close({k: found[k] for k in ("params", "opt")}, {k: state[k] for k in ("params", "opt")})


def test_every_step_all_the_way_is_the_learner_itself():
    (plain, _), (found, _) = trained(LEARNER, 3), trained(lookahead(LEARNER, 1, 1.0), 3)
    close({k: found[k] for k in plain}, plain)


def test_it_begins_with_the_variables_given_and_works_in_a_population():
    learner = lookahead(LEARNER)
    given = jax.tree.map(lambda x: x + 1, LEARNER.variables(started(LEARNER)))
    same(learner.variables(learner.init(KEY, given)), given)
    outside, inside = lookahead(population(LEARNER, 2), 2, 0.5), population(lookahead(LEARNER, 2, 0.5), 2)
    close(outside.variables(trained(outside, 3)[0]), inside.variables(trained(inside, 3)[0]))


def test_bfloat16_params_have_float32_slow_weights():
    def init(key):
        made = TASK.init(key)
        return {**made, "params": jax.tree.map(lambda p: p.astype(jnp.bfloat16), made["params"])}

    learner = lookahead(gradient(TASK._replace(init=init), optax.sgd(0.1)), 2)
    contracts.check_learner(learner)
    state = started(learner)
    assert state["lookahead"]["params"]["linear"]["kernel"].dtype == jnp.float32
    assert learner.variables(state)["params"]["linear"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((LEARNER, 0), "lookahead: every=0; allowed: 1 or more"),
        ((LEARNER, 2, 0.0), "lookahead: alpha=0.0; allowed: above 0, 1 at most"),
        ((LEARNER, 2, 1.5), "lookahead: alpha=1.5"),
        ((lookahead(LEARNER),), 'lookahead: needs a State with "params" and no "lookahead"'),
        ((forward(TASK)._replace(axes={"step": jax.P(), "frozen": {}}),), "got step, frozen"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        lookahead(*arguments)
