"""Runs of several processes, of which one is killed, asked to stop, or started with something else."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from research.core.hooks import read_series
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


def test_one_asked_to_stop_makes_all_save_at_one_step_and_end_well(folder, straight):
    run = Launched(folder / "polite", 2, "--config.pause=0.1", restarts=3)
    run.when(saved(10))
    os.kill(run.pid(1), signal.SIGTERM)
    code, said = run.ended(30)
    assert code == 0 and "interrupted at step" in said and "start again" not in said, said
    stopped = int(said.split("interrupted at step ")[1].split(":")[0])
    assert saved(stopped)(run.workdir) and stopped < 60
    run = Launched(folder / "polite", 2, "--config.pause=0.1")
    assert run.finished()["state_sha256"] == straight
    steps = read_series(run.workdir / "metrics.jsonl")["train/loss"][0]
    assert len(set(steps)) == len(steps) and stopped in steps  # nothing that was logged was lost or done again


@pytest.mark.parametrize("what", ["config", "code"])
def test_one_started_with_something_else_is_refused_by_all(folder, what):
    run = Launched(folder / f"other-{what}", 2, config=f"tests/faults/other_{what}.py", restarts=1)
    code, said = run.ended()
    lines = [line for line in said.splitlines() if "gnomon train:" in line]
    wanted = "config.seed=1, process 0 with 0" if what == "config" else "code of pallas_kernels="
    assert code == 2 and len(lines) == 2 and all(f"process 1 was started with {wanted}" in line for line in lines), said
    assert not run.workdir.exists()


def test_a_hang_in_the_data_of_one_is_reported_by_each_and_the_run_goes_on(folder, straight):
    stall = {"after": 3.0, "read": 20, "process": 1, "seconds": 9.0}
    run = Launched(folder / "hang", 2, *(f"--config.stall.{name}={value}" for name, value in stall.items()))
    assert run.finished()["state_sha256"] == straight
    said = run.said()
    assert all(f"[{i}] process {i} of 2: nothing for 3 s since step" in said for i in (0, 1)), said
    assert "[1]     time.sleep(stall.seconds)" in said and "[0]     time.sleep(stall.seconds)" not in said
