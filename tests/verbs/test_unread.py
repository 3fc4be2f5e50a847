"""Output that nobody reads any more, as of `gnomon reproduce --list | head`, ends a verb with one line that says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from research import cli

ROOT = Path(__file__).parents[2]


def test_a_verb_whose_output_nobody_reads_says_so_and_ends():
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(
        [sys.executable, "-m", "research", "reproduce", "--list"], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert ended.returncode == 141 and ended.stderr == "gnomon reproduce: what read its output has ended\n"


def test_a_pipe_that_breaks_elsewhere_is_no_matter_of_the_output():
    with pytest.raises(BrokenPipeError), cli.one_line_errors("train"):
        raise BrokenPipeError(32, "Broken pipe")
