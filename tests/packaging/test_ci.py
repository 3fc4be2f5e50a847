""".ci/run goes through its stages in order, times them, and fails as soon as one does."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.packaging import house


def ci(tmp_path: Path, failing: str = "") -> subprocess.CompletedProcess[str]:
    """Runs .ci/run with a make that only says what it was asked for, and fails for one target."""
    make = tmp_path / "make"
    make.write_text(f'#!/bin/sh\necho "made $1"\nread -r line && echo "stdin: $line"\n[ "$1" != "{failing}" ] || exit 7\n')
    make.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", house.ROOT / ".ci" / "run"], env=environment, input="typed\n", capture_output=True, text=True, cwd=tmp_path
    )


def test_every_stage_runs_in_order_and_is_timed(tmp_path):
    done = ci(tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"made (\w+)", done.stdout) == ["test", "lint", "aot", "slow"]
    assert re.findall(r"^(\w+) +\d+ s$", done.stdout, re.MULTILINE) == ["tests", "lint", "aot", "slow", "total"]
    assert "typed" not in done.stdout


@pytest.mark.parametrize(
    ("failing", "before"),
    [
        ("test", ["test"]),
        ("lint", ["test", "lint"]),
        ("aot", ["test", "lint", "aot"]),
        ("slow", ["test", "lint", "aot", "slow"]),
    ],
)
def test_a_stage_that_fails_fails_the_whole_at_once(tmp_path, failing, before):
    done = ci(tmp_path, failing)
    assert done.returncode == 7
    assert re.findall(r"made (\w+)", done.stdout) == before
    assert "FAILED (exit code 7)" in done.stderr and "all passed" not in done.stdout


def test_the_readme_names_the_commands_that_ci_runs():
    readme = (house.ROOT / "README.md").read_text()
    makefile = (house.ROOT / "Makefile").read_text()
    for command in re.findall(r"^make (\w+)", readme, re.MULTILINE):
        assert re.search(rf"^{command}:", makefile, re.MULTILINE), f"README: make {command} is not in the Makefile"
    assert re.search(r"^make train\b", readme, re.MULTILINE) and re.search(r"^make test\b", readme, re.MULTILINE)
