"""`forward` measures and never moves params."""

from __future__ import annotations

import jax
import numpy as np

from research.learners import forward
from tests.learners.toys import KEY, TASK, a_batch, close, same, trained


def test_state_is_what_the_loss_makes_of_it_and_params_stay():
    learner = forward(TASK)
    state, seen = trained(learner, 4)
    same(state["params"], TASK.init(KEY)["params"])
    largest = max(np.abs(a_batch(i)["inputs"]).max() for i in range(4))
    assert state["step"] == 4 and state["state"]["seen"] == 32 and state["state"]["largest"] == largest
    mean = np.zeros(3)
    for i in range(4):
        mean = 0.9 * mean + 0.1 * np.asarray(a_batch(i)["inputs"]).mean(0)
    close(state["state"]["mean"], mean)
    close(seen[0]["loss"], seen[0]["squared_error"])


def test_it_starts_from_given_variables():
    given = jax.tree.map(lambda x: x + 1, TASK.init(KEY))
    same(forward(TASK).variables(forward(TASK).init(KEY, given)), given)
