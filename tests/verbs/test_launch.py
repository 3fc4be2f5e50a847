"""`gnomon launch`: what it refuses, and children that are no trainings."""

from __future__ import annotations

import signal
import sys
import threading
import time

import pytest

from research.launch import main
from research.local_processes import Job


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--processes", "2"], "no verb to launch"),
        (["--", "trian"], "verb='trian' is unknown; allowed: evaluate, train; nearest: 'train'"),
        (["--processes", "0", "--", "train"], "--processes 0; allowed: 1 or more"),
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
