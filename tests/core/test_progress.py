"""What a run shows of itself, on a terminal, in a notebook and in a log."""

from __future__ import annotations

import io
import math
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from research.core import progress
from research.core.progress import Progress, duration, measured_matmul_peak, short


class Clock:
    """time.monotonic under the test's hand."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def run(hook, clock, steps, seconds, log_every, evaluate_every=0, evaluation=0.0, start=0):
    hook.start(start, steps, None)
    for step in range(start + 1, steps + 1):
        clock.now += seconds
        hook.step(step)
        if step % log_every == 0:
            hook.log(step, {"loss": 1.0 / step, "nll": math.log(2) * 3})
        if evaluate_every and step % evaluate_every == 0:
            clock.now += evaluation
            hook.evaluated(step, "val", {"bits_per_byte": 2.5})
    hook.end(steps)
    hook.close()


def test_plain_lines_say_step_metrics_speed_mfu_and_time_left(clock):
    out = io.StringIO()
    hook = Progress(
        show=("val/bits_per_byte",), derived={"bits/byte": lambda m: m["nll"] / math.log(2)},
        per_step=4096, unit="tokens", flops_per_step=2e9, peak=1e11, out=out,
    )  # fmt: skip
    run(hook, clock, steps=1000, seconds=0.1, log_every=10, evaluate_every=100, evaluation=10.0)
    lines = out.getvalue().splitlines()
    assert lines[0] == "step   10/1000  loss 0.1  bits/byte 3  41k tokens/s  MFU 20.0%  1:39 left"
    assert "val/bits_per_byte 2.5" in lines[-1] and lines[-1].endswith("3:20 in all")
    assert len(lines) <= 1 + 200 / 5


def test_an_evaluation_or_a_save_does_not_count_as_slow_training(clock):
    hook = Progress(out=io.StringIO())
    hook.start(0, 100, None)
    for step, pause in ((10, hook.saved), (20, lambda step: hook.evaluated(step, "val", {"x": 1.0})), (30, None)):
        for s in range(step - 9, step + 1):
            clock.now += 0.5
            hook.step(s)
        hook.log(step, {"loss": 1.0})
        assert "2 steps/s" in hook.fields(clock.now)
        clock.now += 100
        if pause:
            pause(step)


def test_lines_come_no_oftener_than_every_few_seconds_and_the_last_always(clock):
    out = io.StringIO()
    run(Progress(out=out), clock, steps=1000, seconds=0.01, log_every=1)
    assert len(out.getvalue().splitlines()) == 3  # at once, after 5 s, at the end
    assert out.getvalue().splitlines()[-1].startswith("step 1000/1000")


def test_a_run_that_goes_on_is_timed_from_where_it_went_on(clock):
    out = io.StringIO()
    run(Progress(out=out), clock, steps=1000, seconds=1.0, log_every=10, start=900)
    assert out.getvalue().splitlines()[0] == "step  910/1000  loss 0.001099  1 steps/s  1:30 left"


def test_members_of_a_population_are_shown_by_their_mean(clock):
    out = io.StringIO()
    hook = Progress(show=("val/x",), out=out)
    hook.start(0, 10, None)
    hook.step(1)
    hook.evaluated(1, "val", {"x": np.array([2.0, 4.0])})
    assert "val/x 3" in out.getvalue()


def test_a_terminal_gets_a_bar_and_a_later_stage_its_number(clock):
    out = Terminal()
    hook = Progress(out=out)
    hook.start(0, 4, None, stage=2)
    assert "compiling" in out.getvalue()
    for step in range(1, 5):
        clock.now += 1
        hook.step(step)
        hook.log(step, {"loss": 0.5})
    hook.end(4)
    hook.close()
    assert "━" in out.getvalue() and "stage\u00a02\u00a0step\u00a04/4" in out.getvalue()


def test_a_notebook_gets_one_line_updated_in_place(clock, monkeypatch):
    shown, handle = [], types.SimpleNamespace(update=lambda data, raw: shown.append(data["text/plain"]))
    fake = types.ModuleType("IPython.display")
    fake.display = lambda *args, **kwargs: handle
    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=1)
    ipython.display = fake
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    assert progress.in_notebook()
    run(Progress(), clock, steps=4, seconds=1.0, log_every=1)
    assert shown[-1].startswith("█" * 24 + "  step 4/4") and "░" in shown[0]


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode='loud'; allowed: auto, bar"):
        Progress(mode="loud")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.6, "1:00"), (125, "2:05"), (3725, "1:02:05"), (-1, "0s")])
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.123456, "0.1235"), (999.5, "999.5"), (41234, "41.2k"), (3e6, "3M"), (-2.5e9, "-2.5G")]
)
def test_short_numbers(value, text):
    assert short(value) == text


def test_the_peak_is_measured_once_a_dtype(monkeypatch):
    progress._peak.cache_clear()
    monkeypatch.setattr(progress, "SIZES", (64, 128))
    first = measured_matmul_peak(jnp.float32)
    assert 1e7 < first < 1e15
    assert measured_matmul_peak() == measured_matmul_peak("float32") == first  # a second measurement would differ in some digit
    progress._peak.cache_clear()


def test_what_is_being_measured_is_said_before_it_is_measured():
    out = io.StringIO()
    shown = Progress(mode="lines", out=out)
    shown.start(0, 4, None)
    shown.step(4)
    shown.evaluating(4, "test")
    assert out.getvalue().splitlines()[-1].endswith("measuring test")
    shown.evaluated(4, "test", {})
    assert not any("measuring" in field for field in shown.fields(0.0))
    shown.close()
