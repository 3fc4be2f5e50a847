"""Output that nobody reads any more, as of `gnomon reproduce --list | head`, ends a verb with one line that says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from research import cli

ROOT = Path(__file__).parents[2]


def unread(*command: str) -> tuple[int, str]:
    """(exit code, standard error) of Python's `command`, the reader of whose output has gone."""
    read, write = os.pipe()
    os.close(read)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ended = subprocess.run([sys.executable, *command], cwd=ROOT, env=buffered, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    return ended.returncode, ended.stderr


def test_a_verb_whose_output_nobody_reads_says_so_and_ends():
    assert unread("-m", "research", "reproduce", "--list") == (141, "gnomon reproduce: what read its output has ended\n")


def test_little_that_is_written_at_the_end_is_missed_too():
    code = "from research import cli\nwith cli.one_line_errors('bench'): print('a result')"
    assert unread("-c", code) == (141, "gnomon bench: what read its output has ended\n")


def test_a_pipe_that_breaks_elsewhere_is_no_matter_of_the_output():
    with pytest.raises(BrokenPipeError), cli.one_line_errors("train"):
        raise BrokenPipeError(32, "Broken pipe")
