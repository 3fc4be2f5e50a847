"""Schedules at named points, against their formulas in float64."""

import math

import jax
import numpy as np
import pytest

from research.optim.schedules import SCHEDULES, duration, schedule

PEAK, STEPS, WARMUP, FINAL = 0.5, 1000, 100, 0.1
LAST = STEPS - 1


def test_every_schedule_warms_up_linearly_from_a_first_update_that_counts():
    for name in SCHEDULES:
        f = schedule({"name": name, "warmup": WARMUP}, peak=PEAK, steps=STEPS)
        np.testing.assert_allclose([f(0), f(49), f(99)], [PEAK / 100, PEAK / 2, PEAK], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"name": "constant"}, {100: PEAK, LAST: PEAK}),
        ({"name": "linear", "final": FINAL}, {100: PEAK, 550: PEAK * 0.55, STEPS: PEAK * FINAL, 2000: PEAK * FINAL}),
        ({"name": "cosine", "final": FINAL}, {100: PEAK, 550: PEAK * 0.55, STEPS: PEAK * FINAL, 2000: PEAK * FINAL,
                                              325: PEAK * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)}),
        ({"name": "wsd", "decay": 200}, {100: PEAK, 800: PEAK, 900: PEAK / 2, LAST: PEAK / 200, STEPS: 0.0}),
        ({"name": "wsd", "decay": 0.2, "shape": "sqrt", "final": FINAL}, {799: PEAK, 850: PEAK * 0.55, STEPS: 0.05}),
        ({"name": "wsd", "decay": 0.2, "shape": "exponential", "final": 0.01}, {800: PEAK, 900: 0.05, STEPS: 0.005}),
        ({"name": "inverse_square_root"}, {99: PEAK, 399: PEAK / 2, 899: PEAK / 3}),
        ({"name": "stepwise", "every": 200, "factor": 0.5}, {199: PEAK, 200: PEAK / 2, 399: PEAK / 2, LAST: PEAK / 16}),
    ],
)  # fmt: skip
def test_schedule_has_its_formula(config, expected):
    f = schedule({**config, "warmup": WARMUP}, peak=PEAK, steps=STEPS)
    for step, value in expected.items():
        np.testing.assert_allclose(f(step), value, rtol=1e-5, atol=1e-8, err_msg=f"{config} at {step}")


def test_schedule_is_float32_and_traces():
    for name in SCHEDULES:
        f = schedule({"name": name}, peak=1.0, steps=10)
        traced = jax.jit(jax.vmap(f))(np.arange(12, dtype=np.int32))
        assert traced.dtype == np.float32 and np.isfinite(traced).all(), name
        np.testing.assert_allclose(traced, [f(i) for i in range(12)], rtol=1e-6, atol=1e-7)


def test_a_schedule_without_warmup_starts_at_its_peak():
    for name in SCHEDULES:
        assert schedule({"name": name}, peak=PEAK, steps=STEPS)(0) == np.float32(PEAK), name


def test_durations_are_steps_as_int_and_fractions_as_float():
    assert duration(20, 1000, "x") == 20 and duration(0.02, 1000, "x") == 20 and duration(1.0, 1000, "x") == 1000
    assert duration(1, 1000, "x") == 1
    for bad in (-1, 1001, 1.5, -0.1):
        with pytest.raises(ValueError, match=f"x={bad} is"):
            duration(bad, 1000, "x")


@pytest.mark.parametrize(
    "config, message",
    [
        ({"name": "cosin"}, "schedule.name='cosin' is unknown; allowed: .*; nearest: 'cosine'"),
        ({"name": "cosine", "warm": 3}, "schedule.warm is unknown; allowed in schedule: warmup, final; nearest: 'warmup'"),
        ({"warmup": 3}, "schedule lacks schedule.name"),
        ({"name": "cosine", "final": 2.0}, "schedule.final=2.0 is out of range"),
        ({"name": "wsd", "shape": "squared"}, "schedule.shape='squared' is unknown"),
        ({"name": "wsd", "shape": "exponential"}, "schedule.final=0.0 cannot end an exponential decay"),
        ({"name": "wsd", "warmup": 60, "decay": 50}, "overlap: the run has 100"),
        ({"name": "stepwise", "every": 0}, "schedule.every=0 is no whole step"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_in_one_line(config, message):
    with pytest.raises(ValueError, match=message) as error:
        schedule(config, peak=1.0, steps=100)
    assert "\n" not in str(error.value)
