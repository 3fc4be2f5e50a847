"""`gnomon launch`: what it refuses, and children that are no trainings."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from research import local_processes
from research.launch import main
from research.local_processes import Job, free_port


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--processes", "2"], "no verb to launch"),
        (["--", "trian"], "verb='trian' is unknown; allowed: evaluate, train; nearest: 'train'"),
        (["--processes", "0", "--", "train"], "--processes 0; allowed: 1 or more"),
        (["--proceses=2", "--", "train"], "--proceses is unknown; allowed: -h, --help, --processes, "),
        (["--proceses", "2", "--", "train"], "--claim; nearest: '--processes'; see gnomon launch --help"),
        (["--processes", "2", "train", "--config", "c.py"], "-- is missing before train"),
        (
            ["--engine", "jobset", "--processes", "4", "--dry-run", "--", "train"],
            "--processes 4 means nothing to --engine jobset; allowed with: local, slurm",
        ),
        (
            ["--engine", "slurm", "--devices", "4", "--dry-run", "--", "train"],
            "--devices 4 means nothing to --engine slurm; allowed with: local",
        ),
        (["--nodes", "2", "--", "train"], "--nodes 2 means nothing to --engine local; allowed with: slurm, jobset"),
    ],
)
def test_bad_input_is_one_line(words, says, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and says in err and err.count("\n") == 1


def job(code: str, count: int = 2, restarts: int = 0, heartbeat: int = 1) -> Job:
    return Job([sys.executable, "-c", f"import os, sys, time, signal\ni = int(os.environ['GNOMON_PROCESS'])\n{code}"],
               count, 1, heartbeat, restarts)  # fmt: skip


def test_the_worst_exit_code_is_the_jobs_and_lines_carry_their_process(capfd):
    assert job("print('from', i); sys.exit(i)", 3).run() == 2
    assert sorted(capfd.readouterr().out.splitlines()) == ["[0] from 0", "[1] from 1", "[2] from 2"]


def test_a_crash_starts_all_again_as_often_as_is_allowed(tmp_path, capfd):
    code = f"n = len(os.listdir({str(tmp_path)!r})); i or open(f'{tmp_path}/{{n}}', 'w'); time.sleep(0.3)\n"
    assert job(code + "if n < 2 and not i: os.kill(os.getpid(), 9)\ntime.sleep(0.3)", restarts=2).run() == 0
    said = capfd.readouterr().err
    assert "process 0 was ended by SIGKILL; all 2 start again (1 of 2)" in said and "(2 of 2)" in said


def test_a_failure_of_its_own_is_not_tried_again_and_ends_the_others(capfd):
    began = time.monotonic()
    assert job("sys.exit(2) if i else time.sleep(60)", restarts=3).run() == 137  # the other had its chance to notice
    assert "start again" not in capfd.readouterr().err and time.monotonic() - began < 30


def test_a_signal_reaches_every_child_and_nothing_is_started_again():
    def stop():
        time.sleep(1.0)
        signal.raise_signal(signal.SIGTERM)

    threading.Thread(target=stop).start()
    assert job("signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); time.sleep(60)", restarts=3).run() == 0


LAUNCHER = """
import sys
from research.local_processes import Job

sys.exit(Job([sys.executable, "-c", sys.argv[1]], 2, 1, 5, 3).run())
"""
SAVING = """
import os, signal, time
from research.core import processes

def saved(*_):
    print("said to nobody", flush=True)
    open(f"{folder}/saved-{i}", "w").close()
    os._exit(0)

i = os.environ[processes.INDEX]
signal.signal(signal.SIGTERM, saved)
processes.follow_launcher()
open(f"{folder}/pid-{i}", "w").write(str(os.getpid()))
while not all(os.path.exists(f"{folder}/pid-{j}") for j in (0, 1)):
    time.sleep(0.01)
while True:
    print("a line " * 500, flush=True)
    time.sleep(0.05)
"""


def launched(folder, **streams) -> subprocess.Popen:
    """Two children that tell their pids, print without end, and leave a file when they are asked to stop."""
    code = SAVING.replace("{folder}", str(folder))
    return subprocess.Popen([sys.executable, "-c", LAUNCHER, code], **{"stderr": subprocess.PIPE, **streams})


def appear(*paths, within: float = 30.0) -> bool:
    until = time.monotonic() + within
    while not all(path.exists() for path in paths) and time.monotonic() < until:
        time.sleep(0.05)
    return all(path.exists() for path in paths)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGHUP], ids=["SIGKILL", "SIGHUP"])
def test_where_the_launcher_is_gone_its_processes_save_and_end(tmp_path, signum):
    launcher = launched(tmp_path, stdout=subprocess.DEVNULL)
    assert appear(tmp_path / "pid-0", tmp_path / "pid-1")
    launcher.send_signal(signum)
    assert launcher.wait(30) == -signum
    saved = appear(tmp_path / "saved-0", tmp_path / "saved-1", within=5.0)
    for i in (0, 1):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int((tmp_path / f"pid-{i}").read_text()), signal.SIGKILL)
    assert saved


@pytest.mark.slow
def test_where_the_output_cannot_be_written_all_save_and_end_with_a_line(tmp_path):
    nobody, pipe = os.pipe()
    os.close(nobody)
    launcher = launched(tmp_path, stdout=pipe)
    os.close(pipe)
    _, said = launcher.communicate(timeout=30)
    assert launcher.returncode == 1 and (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists()
    assert said.decode() == (
        "gnomon launch: what the processes print cannot be written (Broken pipe): all are asked to save and stop\n"
    )


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_line_and_another_is_tried(tmp_path, monkeypatch, capfd):
    train = ["--config", "tests/faults/toy_run.py", "--workdir", str(tmp_path / "run"), "--config.steps=1"]
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        ports = iter([taken.getsockname()[1], free_port()])
        monkeypatch.setattr(local_processes, "free_port", lambda: next(ports))
        assert Job([sys.executable, "-m", "research.train", *train], 1, 1, 5, 1).run() == 0
    out, err = capfd.readouterr()
    assert "[0] gnomon train: the processes cannot meet at localhost:" in out and "Traceback" not in out
    assert "all 1 start again (1 of 1)" in err
