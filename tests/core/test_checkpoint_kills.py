"""Checkpoints under kill -9: at any moment, and before each single change on disk."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from research.core.checkpoint import Checkpoints, state_sha256
from tests.core.saving import Saver, state_at
from tests.core.states import names, saved

ROOT = Path(__file__).parents[2]


# Kills
@pytest.fixture
def memory(tmp_path):
    """A folder in memory where there is one: kills are as hard there, and nothing waits for a disk."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def saver():
    with Saver() as saver:
        yield saver


def assert_whole(directory: Path, at_least: int) -> int:
    """The newest checkpoint is intact and holds the arrays of its step; nothing unfinished stays. Its step."""
    checkpoints = Checkpoints(directory, keep_latest=2, best="val/loss")
    found = checkpoints.latest()
    step = 0 if found is None else found.step
    assert step >= at_least
    if found is not None:
        assert state_sha256(checkpoints.load(found)) == state_sha256(state_at(step))
        assert found.position == {"next": step}
        best = checkpoints.best()
        assert best.step == min(step, 5) and state_sha256(checkpoints.load(best)) == state_sha256(state_at(best.step))
        assert not [name for name in names(directory) if name.startswith((".", "damaged"))]
    return step


@pytest.mark.faults
def test_killed_at_any_moment_the_newest_checkpoint_is_whole(memory, saver):
    def wait_until(condition):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def saved_up_to():
        return max((int(name[2:]) for name in names(memory) if name.startswith("0-")), default=0)

    generator, step = random.Random(0), 0
    pid = saver.begin(memory)
    wait_until(lambda: saved_up_to() >= 1)
    began = time.monotonic()
    wait_until(lambda: saved_up_to() >= 3)
    save_seconds = (time.monotonic() - began) / 2
    for kill in range(30):
        os.kill(pid, signal.SIGKILL)
        assert saver.ended() == signal.SIGKILL
        step = assert_whole(memory, at_least=max(step, 3))
        if kill < 29:
            pid = saver.begin(memory)
            wait_until(lambda: any(memory.glob(".partial-*")))  # the child has started
            if kill % 3 == 0:  # some are killed in a later save than the first, however slow the machine is
                wait_until(lambda step=step: saved_up_to() > step)
            time.sleep(generator.uniform(0, 1.5 * save_seconds))
    assert step >= 13


@pytest.mark.faults
def test_ended_before_each_single_change_on_disk_the_checkpoints_are_whole(memory, saver):
    """One more save (it stores a new frozen and deletes an old checkpoint), cut before the first, second, … call that changes
    the disk, until nothing is cut."""
    start = memory / "start"
    saver.begin(start, saves=7)
    assert saver.ended() == 0
    for crash in range(1, 200):
        directory = memory / str(crash)
        subprocess.run(["cp", "-r", start, directory], check=True)
        saver.begin(directory, saves=1, crash=crash)
        status = saver.ended()
        step = assert_whole(directory, at_least=7)
        if status == 0:
            break
        assert os.waitstatus_to_exitcode(status) == 17
        shutil.rmtree(directory)
    assert step == 8 and crash > 15


@pytest.mark.faults
def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path):
    saved(tmp_path, steps=(1,)).close()
    (tmp_path / "0-1").rename(tmp_path / ".replaced-0-1")
    (tmp_path / ".partial-0-1").mkdir()
    (tmp_path / ".deleted-0-0").mkdir()
    assert Checkpoints(tmp_path).latest().step == 1
    assert names(tmp_path) == {"0-1"}
