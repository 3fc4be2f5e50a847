"""kill -9 at any moment, saves included: the same command goes on, and ends with the bits of an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.launching import damage

REPO = Path(__file__).resolve().parents[2]
STEPS = 60
CONFIG = f"""
from tests.verbs import smoke_on_readme


def get_config(arg=""):
    config = smoke_on_readme.get_config()
    config.train.update({{"steps": {STEPS}, "log_every": 5}})
    config.checkpoint.update({{"every": 2, "keep_latest": 2}})
    return config
"""


def command(folder: Path, workdir: str) -> list[str]:
    return [sys.executable, "-m", "research.train", "--config", str(folder / "mine.py"), "--workdir", str(folder / workdir)]


def started(folder: Path, workdir: str) -> subprocess.Popen:
    """The command, begun. What is compiled once is kept beside the runs, since there are many starts."""
    kept = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment, out = {**os.environ, **kept}, subprocess.PIPE
    return subprocess.Popen(command(folder, workdir), cwd=REPO, env=environment, stdout=out, stderr=out, text=True)


def finished(folder: Path, workdir: str) -> str:
    """Runs the command to its end; what it printed."""
    process = started(folder, workdir)
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    return out + err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the config, and an uninterrupted run in straight/."""
    folder = tmp_path_factory.mktemp("interruptions")
    (folder / "mine.py").write_text(CONFIG)
    finished(folder, "straight")
    return folder


def ends_in_the_same_bits(folder: Path, workdir: str) -> bool:
    first, second = (json.loads((folder / name / "summary.json").read_text()) for name in (workdir, "straight"))
    return first["state_sha256"] == second["state_sha256"] and first["steps"] == STEPS


def interrupted(folder: Path, workdir: str, moment, signum: int = signal.SIGKILL) -> int | None:
    """Starts the command, and sends the signal when `moment(workdir)` says so. The exit code after it; None where the command
    had ended well before."""
    process = started(folder, workdir)
    while process.poll() is None:
        if moment(folder / workdir):
            process.send_signal(signum)
            process.communicate(timeout=60)
            return process.returncode
        time.sleep(0.002)
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    return None


def checkpoints(workdir: Path, pattern: str) -> list[Path]:
    """Checkpoints by name, the newest last: "[0-9]*" are in place, ".*" are being written."""
    return sorted((workdir / "checkpoints").glob(pattern), key=lambda path: path.stat().st_mtime)


def saving(workdir: Path) -> bool:
    return bool(list((workdir / "checkpoints").glob(".*")))


def saved(number: int):
    return lambda workdir: len(list((workdir / "checkpoints").glob("[0-9]*"))) >= number


def after(seconds: float):
    until = time.monotonic() + seconds
    return lambda workdir: time.monotonic() > until


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(1500)
def test_twenty_kills_end_in_the_bits_of_an_uninterrupted_run(folder):
    draw = random.Random(0)
    began = time.monotonic()
    assert interrupted(folder, "killed-0", saved(1)) == -signal.SIGKILL
    start_up = time.monotonic() - began
    kills, runs = 1, 0
    while kills < 20:  # of one run, and of the next where that has come to its end
        moment = saving if kills % 2 else after(draw.uniform(0.2, 1.3) * start_up)
        if interrupted(folder, f"killed-{runs}", moment) is None:
            assert ends_in_the_same_bits(folder, f"killed-{runs}")
            runs += 1
        else:
            kills += 1
    finished(folder, f"killed-{runs}")
    assert ends_in_the_same_bits(folder, f"killed-{runs}")


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_polite_signal_saves_and_exits_0_and_the_same_command_goes_on(folder, signum):
    name = f"polite-{signum}"
    assert interrupted(folder, name, saved(1), signum) == 0
    assert not (folder / name / "summary.json").exists()
    finished(folder, name)
    assert ends_in_the_same_bits(folder, name)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("how", ["truncated", "deleted", "flipped"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(folder, how):
    name = f"damaged-{how}"
    interrupted(folder, name, saved(2))
    newest = checkpoints(folder / name, "[0-9]*")[-1]
    damage(newest, how)
    assert str(newest) in finished(folder, name)
    assert ends_in_the_same_bits(folder, name)


@pytest.mark.slow
@pytest.mark.faults
def test_where_no_checkpoint_is_intact_the_run_stops_and_says_so(folder):
    interrupted(folder, "lost", saved(2))
    for path in checkpoints(folder / "lost", "[0-9]*"):
        damage(path, "truncated")
    for _ in range(2):  # the second start finds them put aside, and begins nothing anew either
        process = started(folder, "lost")
        _, err = process.communicate()
        assert process.returncode == 1 and "intact" in err and "Traceback" not in err
        assert checkpoints(folder / "lost", "damaged-*") and not checkpoints(folder / "lost", "[0-9]*")
