"""Runs of several processes, of which one is killed, asked to stop, or started with something else."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from research.core.hooks import read_series
from research.core.workdir import load_run
from tests.faults.launching import HEARTBEAT, Launched, saved, saving

pytestmark = [pytest.mark.slow, pytest.mark.faults]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def straight(folder) -> str:
    """The State that an uninterrupted run of two processes ends in."""
    return Launched(folder / "straight").finished()["state_sha256"]


def losses(workdir: Path) -> np.ndarray:
    return read_series(workdir / "metrics.jsonl")["train/loss"][1]


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
    assert saved(stopped)(run.workdir) and stopped < 63
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


@pytest.mark.parametrize(("before", "after"), [(2, 4), (3, 1), (1, 2)])
def test_another_number_of_processes_goes_on_and_sees_what_is_left_of_an_epoch_once(folder, straight, before, after):
    folder = folder / f"{before}-{after}"
    folder.mkdir()
    run = Launched(folder / "run", before, "--config.pause=0.1")
    run.when(saved(10))
    os.kill(run.pid(0), signal.SIGTERM)
    code, said = run.ended()
    assert code == 0 and "interrupted at step" in said
    run = Launched(folder / "run", after, "--config.pause=0.1")
    run.finished()
    np.testing.assert_array_equal(load_run(run.workdir).variables["state"]["seen"], 7)
    np.testing.assert_allclose(losses(run.workdir)[-6:], losses(folder.parent / "straight")[-6:], rtol=1e-5)


def test_a_full_disk_stops_the_run_and_the_last_good_checkpoint_is_used_next(folder, straight):
    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode and os.geteuid():
        pytest.skip(f"a small disk can be mounted by root alone: {mounted.stderr.strip()}")
    assert mounted.returncode == 0, mounted.stderr
    try:
        run = Launched(disk / "run", 2, "--config.pause=0.1", log=folder / "full.log")
        run.when(saved(10))
        with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        code, said = run.ended()
        assert code not in (0, None) and str(run.workdir) in said and "no space left" in said.lower(), said
        assert "Traceback" not in said
        (disk / "filler").unlink()
        (kept,) = [int(p.name.split("-")[1]) for p in (run.workdir / "checkpoints").glob("0-*")][-1:]
        run = Launched(disk / "run", 2, "--config.pause=0.1", log=folder / "again.log")
        assert run.finished()["state_sha256"] == straight and kept < 63 and "damaged" not in run.said()
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
