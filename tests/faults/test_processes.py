"""Runs of several processes, of which one is killed, asked to stop, or started with something else."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from research.core.hooks import read_series
from research.core.workdir import load_run
from research.local_processes import environment, free_port
from tests.faults.launching import HEARTBEAT, REPO, TOY, Launched, damage, saved, saving

pytestmark = [pytest.mark.alone, pytest.mark.slow, pytest.mark.faults]
SHARDED = ("--config.mesh.data=1", "--config.mesh.fsdp=-1")  # each process holds, and writes, a part of the State


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def straight(folder):
    """count, words -> the hash of the State that an uninterrupted run of so many processes ends in."""

    @functools.cache
    def ended(count: int, *words: str) -> str:
        return Launched(folder / f"straight-{count}-{len(words)}", count, *words).finished()["state_sha256"]

    return ended


def losses(workdir: Path) -> np.ndarray:
    return read_series(workdir / "metrics.jsonl")["train/loss"][1]


def ended(pids: list[int], within: float) -> float:
    """Seconds until these processes are gone, which is not waited for longer than `within`."""
    began = time.monotonic()
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < began + within:
        time.sleep(0.05)
    return time.monotonic() - began


@pytest.mark.parametrize(
    ("count", "index", "moment"),
    [(2, 1, saved(10)), (2, 0, saved(10)), (2, 1, saving), (2, 0, saving), (3, 2, saved(10))],
    ids=["mid-step", "first-mid-step", "mid-save", "first-mid-save", "one-of-three"],
)
def test_one_killed_ends_the_others_with_a_line_and_all_start_again(folder, straight, count, index, moment, request):
    run = Launched(folder / request.node.callspec.id, count, "--config.pause=0.1", restarts=1)
    run.when(moment)
    others = {i: run.pid(i) for i in range(count) if i != index}
    os.kill(run.pid(index), signal.SIGKILL)
    waited = ended(list(others.values()), HEARTBEAT + 15)
    summary = run.finished()
    assert waited < HEARTBEAT + 5
    assert summary["state_sha256"] == straight(count)
    lines = run.said().splitlines()
    for i in others:
        told = next(line for line in lines if line.startswith(f"[{i}] ") and " step " not in line)
        assert "this process ends too" in told
    assert sum("ends too" in line for line in lines) == len(others) and "Traceback" not in run.said()
    assert f"process {index} was ended by SIGKILL; all {count} start again (1 of 1)" in run.said()


def test_one_asked_to_stop_makes_all_save_at_one_step_and_end_well(folder, straight):
    run = Launched(folder / "polite", 2, "--config.pause=0.1", restarts=3)
    run.when(saved(10))
    os.kill(run.pid(1), signal.SIGTERM)
    code, said = run.ended(30)
    assert code == 0 and "interrupted at step" in said and "start again" not in said, said
    stopped = int(said.split("interrupted at step ")[1].split(":")[0])
    assert saved(stopped)(run.workdir) and stopped < 63
    run = Launched(folder / "polite", 2, "--config.pause=0.1")
    assert run.finished()["state_sha256"] == straight(2)
    steps = read_series(run.workdir / "metrics.jsonl")["train/loss"][0]
    assert len(set(steps)) == len(steps) and stopped in steps  # nothing that was logged was lost or done again


def logged(workdir: Path) -> bool:
    return (workdir / "metrics.jsonl").exists() and b"loss" in (workdir / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(("every", "moment"), [(60, logged), (10, saving)], ids=["before-any-save", "mid-save"])
def test_where_the_launcher_is_killed_all_save_at_one_step_and_end(folder, straight, every, moment):
    words, name = ("--config.pause=0.1", f"--config.every={every}"), f"orphans-{every}"
    run = Launched(folder / name, 2, *words, restarts=3)
    run.when(moment)
    pids = [run.pid(0), run.pid(1)]
    run.process.kill()
    assert ended(pids, HEARTBEAT + 15) < HEARTBEAT + 5
    stopped = int(newest(run).name.split("-")[1])
    assert stopped < 60 and stopped in read_series(run.workdir / "metrics.jsonl")["train/loss"][0]
    run = Launched(folder / name, 2, *words)
    assert run.finished()["state_sha256"] == straight(2)


def test_one_started_with_another_config_is_refused_by_all(folder):
    run = Launched(folder / "other-config", 2, config="tests/faults/other_config.py", restarts=1)
    code, said = run.ended()
    lines = [line for line in said.splitlines() if "gnomon train:" in line]
    wanted = "process 1 was started with config.seed=1, process 0 with 0"
    assert code == 2 and len(lines) == 2 and all(wanted in line for line in lines), said
    assert not run.workdir.exists()


def test_one_started_from_other_code_is_refused_by_all(folder):
    """Process 1 begins in a checkout of which one line is another."""
    checkout = folder / "checkout"
    for package in ("research", "pallas_kernels"):
        shutil.copytree(REPO / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    changed = checkout / "research" / "core" / "loop.py"
    changed.write_text(changed.read_text().replace("fold_in(key, step)", "fold_in(key, step + 1)", 1))
    port, workdir = free_port(), folder / "other-code"
    command = [sys.executable, "-m", "research.train", "--config", str(REPO / TOY), "--workdir", str(workdir)]
    runs = [
        subprocess.Popen(command, cwd=cwd, env={**os.environ, "PYTHONPATH": str(REPO), **environment(i, 2, port, 1, HEARTBEAT)},
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for i, cwd in enumerate((REPO, checkout))
    ]  # fmt: skip
    for run in runs:
        said, _ = run.communicate(timeout=60)
        (line,) = [line for line in said.splitlines() if "gnomon train:" in line]
        assert run.returncode == 2 and "process 1 was started with code of research=" in line, said
    assert not workdir.exists()


def test_a_hang_in_the_data_of_one_is_reported_by_each_and_the_run_goes_on(folder, straight):
    stall = {"after": 3.0, "read": 20, "process": 1, "seconds": 9.0}
    run = Launched(folder / "hang", 2, *(f"--config.stall.{name}={value}" for name, value in stall.items()))
    assert run.finished()["state_sha256"] == straight(2)
    said = run.said()
    assert all(f"[{i}] process {i} of 2: nothing for 3 s since step" in said for i in (0, 1)), said
    assert "[1]     time.sleep(stall.seconds)" in said and "[0]     time.sleep(stall.seconds)" not in said


@pytest.mark.parametrize(("before", "after"), [(2, 4), (3, 1), (1, 2)])
def test_another_number_of_processes_goes_on_and_sees_what_is_left_of_an_epoch_once(folder, straight, before, after):
    straight(2)
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
    np.testing.assert_allclose(losses(run.workdir)[-6:], losses(folder.parent / "straight-2-0")[-6:], rtol=1e-5)


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
        assert run.finished()["state_sha256"] == straight(2) and kept < 63 and "damaged" not in run.said()
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def newest(run: Launched) -> Path:
    return max((run.workdir / "checkpoints").glob("0-*"), key=lambda path: int(path.name.split("-")[1]))


def test_a_checkpoint_with_a_flipped_bit_is_named_and_all_go_on_from_the_one_before(folder, straight):
    run = Launched(folder / "flipped", 2, "--config.pause=0.1", *SHARDED)
    run.when(saved(10))
    os.kill(run.pid(0), signal.SIGTERM)
    assert run.ended()[0] == 0
    file = damage(newest(run), "flipped")
    run = Launched(folder / "flipped", 2, "--config.pause=0.1", *SHARDED)
    assert run.finished()["state_sha256"] == straight(2, *SHARDED)
    (line,) = [line for line in run.said().splitlines() if "damaged" in line]
    assert line.startswith("[0]") and str(file) in line


def test_a_save_that_fails_in_one_process_stops_all_at_the_next_step(folder, straight):
    run = Launched(folder / "failing", 2, "--config.pause=0.2", *SHARDED)
    run.when(saved(10))
    before = newest(run)
    resource.prlimit(run.pid(1), resource.RLIMIT_FSIZE, (0, 0))  # from now on, whatever it writes to a file fails
    code, said = run.ended()
    told = [line for line in said.splitlines() if "was not saved" in line]
    assert code == 1 and len(told) == 2 and "process 1: " in told[0] + told[1] and "Traceback" not in said, said
    failed = told[0].split(" was not saved")[0].split()[-1]
    assert newest(run) == before and all(f"{failed} was not saved" in line for line in told)
    steps = read_series(run.workdir / "metrics.jsonl")["train/loss"][0]
    assert steps[-1] == int(failed.rpartition("-")[2])  # every fifth is logged: it did not come to the next of them
    run = Launched(folder / "failing", 2, "--config.pause=0.2", *SHARDED)
    assert run.finished()["state_sha256"] == straight(2, *SHARDED) and "damaged" not in run.said()
