"""Signals: an event between steps, an exception elsewhere, and one event for both."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from research.__main__ import main
from research.core.interrupts import Interrupted, interrupts


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_outside_of_steps_a_signal_raises_and_between_them_it_asks(signum):
    with interrupts(raising=True) as outer:
        with interrupts() as asked:
            os.kill(os.getpid(), signum)
            assert asked.wait(5)
        with pytest.raises(Interrupted) as raised:
            os.kill(os.getpid(), signum)
        assert raised.value.code == 128 + signum and outer is asked


def test_a_second_ctrl_c_raises():
    with interrupts():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_put_back():
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with interrupts(raising=True), interrupts():
        pass
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_thread_has_an_event_that_stays_unset():
    found = []

    def work():
        with interrupts() as asked:
            found.append(asked.is_set())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


def test_a_run_that_is_ended_before_its_first_step_says_so_in_one_line_and_leaves_nothing(tmp_path, capfd):
    (tmp_path / "mine.py").write_text(
        "import os, signal\n"
        "from configs.lm import stdlib\n"
        "def get_config(arg=''):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return stdlib.get_config('smoke')\n"
    )
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", str(tmp_path / "mine.py"), "--workdir", str(tmp_path / "run")])
    told = capfd.readouterr()
    assert ended.value.code == 143 and "ended by SIGTERM" in told.err and "Traceback" not in told.err
    assert not (tmp_path / "run").exists()
