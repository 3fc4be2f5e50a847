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

REPO = Path(__file__).resolve().parents[2]
STEPS = 60
CONFIG = f"""
from configs.lm import stdlib
ARGS = ("smoke",)
def get_config(arg=""):
    config = stdlib.get_config("smoke")
    config.train.update({{"steps": {STEPS}, "log_every": 5}})
    config.checkpoint.update({{"every": 2, "keep_latest": 2}})
    config.evaluate.update({{"every": 0}})
    config.data = {{"name": "files", "paths": ["README.md"], "tokenizer": "bytes", "split": "position", "separator": "",
                    "field": ""}}
    return config
""".replace('"field": ""', '"field": config_dict.placeholder(str)').replace(
    "from configs.lm import stdlib", "from configs.lm import stdlib\nfrom ml_collections import config_dict"
)


def command(folder: Path, workdir: str) -> list[str]:
    return [sys.executable, "-m", "research.train", "--config", str(folder / "mine.py"), "--workdir", str(folder / workdir)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the config, and an uninterrupted run in straight/."""
    folder = tmp_path_factory.mktemp("interruptions")
    (folder / "mine.py").write_text(CONFIG)
    subprocess.run(command(folder, "straight"), cwd=REPO, check=True, capture_output=True)
    return folder


def summary(folder: Path, workdir: str) -> dict:
    return json.loads((folder / workdir / "summary.json").read_text())


def killed(folder: Path, workdir: str, moment, signum: int = signal.SIGKILL) -> int | None:
    """Starts the command, and sends the signal when `moment(workdir)` says so. The exit code, if it ended by itself."""
    process = subprocess.Popen(command(folder, workdir), cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while process.poll() is None:
        if moment(folder / workdir):
            process.send_signal(signum)
            process.communicate(timeout=60)
            return process.returncode if signum != signal.SIGKILL else None
        time.sleep(0.002)
    output = process.communicate()[0].decode()
    assert process.returncode == 0, output
    return 0


def saving(workdir: Path) -> bool:
    """Whether a save is under way: its folder is not in place yet."""
    checkpoints = workdir / "checkpoints"
    return checkpoints.exists() and any(name.startswith(".") for name in os.listdir(checkpoints))


def after(seconds: float):
    until = time.monotonic() + seconds
    return lambda workdir: time.monotonic() > until


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(1500)
def test_twenty_kills_end_in_the_bits_of_an_uninterrupted_run(folder):
    draw = random.Random(0)
    began = time.monotonic()
    killed(folder, "timing", lambda workdir: (workdir / "checkpoints").exists())
    start_up = time.monotonic() - began
    kills = 0
    while kills < 20:
        moment = saving if kills % 2 else after(draw.uniform(0.2, 1.3) * start_up)
        if killed(folder, "killed", moment) == 0:
            break
        kills += 1
    while not (folder / "killed" / "summary.json").exists():
        killed(folder, "killed", lambda workdir: False)
    assert kills >= 5  # a run may end before the twentieth; then the rest is spent on new ones below
    assert summary(folder, "killed")["state_sha256"] == summary(folder, "straight")["state_sha256"]
    for more in range(kills, 20):
        name = f"again-{more}"
        killed(folder, name, saving if more % 2 else after(draw.uniform(0.9, 1.3) * start_up))
        assert killed(folder, name, lambda workdir: False) == 0
        assert summary(folder, name)["state_sha256"] == summary(folder, "straight")["state_sha256"]


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_polite_signal_saves_and_exits_0_and_the_same_command_goes_on(folder, signum):
    name = f"polite-{signum}"
    code = killed(folder, name, lambda workdir: (workdir / "checkpoints").exists(), signum)
    assert code == 0 and not (folder / name / "summary.json").exists()
    assert killed(folder, name, lambda workdir: False) == 0
    assert summary(folder, name)["state_sha256"] == summary(folder, "straight")["state_sha256"]


def newest(workdir: Path) -> Path:
    return sorted(p for p in (workdir / "checkpoints").iterdir() if p.name[0].isdigit())[-1]


def damage(path: Path, how: str) -> Path:
    """Damages the largest file of a checkpoint."""
    file = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = file.read_bytes()
    if how == "deleted":
        file.unlink()
    else:
        changed = content[: len(content) // 2] if how == "truncated" else content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
        file.write_bytes(changed)
    return file


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("how", ["truncated", "deleted", "flipped"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(folder, how):
    name = f"damaged-{how}"
    killed(folder, name, lambda workdir: len(list((workdir / "checkpoints").glob("[0-9]*"))) >= 2)
    file = damage(newest(folder / name), how)
    done = subprocess.run(command(folder, name), cwd=REPO, capture_output=True, text=True, check=True)
    assert file.name in done.stdout + done.stderr
    assert summary(folder, name)["state_sha256"] == summary(folder, "straight")["state_sha256"]


@pytest.mark.slow
@pytest.mark.faults
def test_where_no_checkpoint_is_intact_the_run_stops_and_says_so(folder):
    killed(folder, "lost", lambda workdir: len(list((workdir / "checkpoints").glob("[0-9]*"))) >= 2)
    for path in (folder / "lost" / "checkpoints").glob("[0-9]*"):
        damage(path, "truncated")
    done = subprocess.run(command(folder, "lost"), cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "intact" in done.stderr and len(done.stderr.strip().splitlines()[-1]) > 0
