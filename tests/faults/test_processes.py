"""Runs of several processes, of which one is killed, asked to stop, or started with something else."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.faults.launching import HEARTBEAT, Launched, saved, saving

pytestmark = [pytest.mark.slow, pytest.mark.faults]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def straight(folder) -> str:
    """The State that an uninterrupted run of two processes ends in."""
    return Launched(folder / "straight").finished()["state_sha256"]


@pytest.mark.parametrize(("index", "moment"), [(1, saved(10)), (0, saved(10)), (1, saving), (0, saving)],
                         ids=["mid-step", "first-mid-step", "mid-save", "first-mid-save"])  # fmt: skip
def test_one_killed_ends_the_others_with_a_line_and_all_start_again(folder, straight, index, moment, request):
    run = Launched(folder / request.node.callspec.id, 2, "--config.pause=0.1", restarts=1)
    run.when(moment)
    pid = run.pid(1 - index)
    os.kill(run.pid(index), signal.SIGKILL)
    began = time.monotonic()
    while Path(f"/proc/{pid}").exists() and time.monotonic() < began + HEARTBEAT + 15:
        time.sleep(0.05)
    waited = time.monotonic() - began
    summary = run.finished()
    assert waited < HEARTBEAT + 5
    assert summary["state_sha256"] == straight
    lines = run.said().splitlines()
    of_the_other = [line for line in lines if line.startswith(f"[{1 - index}] ") and " step " not in line]
    told = of_the_other[0]
    assert "this process ends too" in told
    assert sum("ends too" in line for line in lines) == 1 and "Traceback" not in run.said()
    assert f"process {index} was ended by SIGKILL; all 2 start again (1 of 1)" in run.said()
