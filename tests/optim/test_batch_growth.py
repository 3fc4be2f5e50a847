"""Batches that grow with the measured noise, as stages."""

import math

import optax
import pytest

from research.core.batches import from_function
from research.core.loop import run
from research.estimates._example import linear_regression
from research.learners import gradient
from research.optim.batch_growth import batch_sizes, growing
from tests.learners.toys import KEY


def test_a_plan_follows_the_noise_and_sees_the_same_rows():
    measured = [(100, 20.0), (200, math.nan), (300, 70.0), (400, 40.0), (500, 5000.0)]
    plan = batch_sizes(measured, batch=16, steps=600, largest=256)
    assert plan == [(16, 200), (64, 50), (256, 12)]
    assert sum(b * s for b, s in plan) == pytest.approx(16 * 600, rel=0.02)


def test_rows_may_hold_many_examples():
    assert batch_sizes([(10, 64 * 32.0)], batch=8, steps=10, largest=64, examples_a_row=64) == [(32, 2)]


@pytest.mark.parametrize(
    "measured, largest, message",
    [
        ([(5, 1.0), (3, 1.0)], 64, r"measured at steps \[5, 3\]; allowed: rising, from 1 to 10"),
        ([], 64, "allowed: rising"),
        ([(11, 1.0)], 64, "from 1 to 10"),
        ([(5, 1.0)], 4, "largest=4; allowed: batch=8 or more"),
    ],
)
def test_what_cannot_be_planned_is_refused(measured, largest, message):
    with pytest.raises(ValueError, match=message):
        batch_sizes(measured, batch=8, steps=10, largest=largest)


def test_stages_hand_on_their_variables_and_grow():
    import numpy as np

    def make(batch, steps):
        def rows(i):
            x = np.random.default_rng([batch, i]).normal(size=(batch, 3)).astype(np.float32)
            return {"inputs": x, "targets": x.sum(1), "mask": np.ones(batch, np.float32)}

        return gradient(linear_regression(batch), optax.sgd(0.1)), from_function(rows, None, f"rows of {batch}")

    stages = growing([(4, 3), (8, 2)], make)
    assert [(s.learner.batch["mask"].shape, s.steps) for s in stages] == [((4,), 3), ((8,), 2)]
    outcome = run(stages, key=KEY)
    assert int(outcome.state["state"]["seen"]) == 4 * 3 + 8 * 2
    with pytest.raises(ValueError, match="batches that do not shrink"):
        growing([(8, 3), (4, 2)], make)


@pytest.mark.parametrize("size", ["batch", "examples_a_row"])
def test_a_size_of_zero_is_refused_by_name(size):
    with pytest.raises(ValueError, match=f"batch_sizes: {size}=0; allowed: 1 or more"):
        batch_sizes([(5, 1.0)], **{"batch": 8, "steps": 10, "largest": 64, size: 0})
