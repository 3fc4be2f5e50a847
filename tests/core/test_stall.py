"""A report of what every thread does, where nothing moves; over several processes: tests/faults/test_processes.py."""

from __future__ import annotations

import io
import time

import pytest

from research.core.stall import Stall


def test_it_reports_once_each_time_that_nothing_moves():
    out = io.StringIO()
    hook = Stall(0.2, out)
    hook.start(0, 10, None)
    time.sleep(0.7)
    assert out.getvalue().count("process 0 of 1: nothing for 0.2 s since step 0") == 1
    assert "thread MainThread:" in out.getvalue() and "time.sleep(0.7)" in out.getvalue()
    hook.step(3)
    time.sleep(0.7)
    assert out.getvalue().count("since step 3") == 1
    hook.close()
    time.sleep(0.3)
    assert out.getvalue().count("nothing for 0.2 s") == 2


def test_what_moves_is_not_reported():
    out = io.StringIO()
    hook = Stall(0.5, out)
    hook.start(0, 10, None)
    for step in range(8):
        time.sleep(0.1)
        hook.step(step)
    hook.close()
    assert not out.getvalue()


def test_a_time_that_is_none_is_refused():
    with pytest.raises(ValueError, match="stall: after=0; allowed: more than 0 seconds"):
        Stall(0)
