"""A process that saves checkpoints until it is killed: `Saver` here, and the script that it runs.

The script imports once, and forks a child a line of input.

argv: repository. Each line: JSON of `save_on`'s arguments; crash n > 0: the process ends without a
word at the n-th change of the file system that Checkpoints makes. Answers: the child's pid, then "<pid> <status>" at the end.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])

from research.core import files, storage
from research.core.checkpoint import Checkpoints


def state_at(step: int) -> dict:
    """Every array says which step it is of."""
    return {
        "step": np.asarray(step, np.int32),
        "params": {"w": np.full((64, 32), step, np.float32), "b": np.arange(7, dtype=np.float32) * step},
        "frozen": {"teacher": np.full((5,), step // 4, np.float32)},
    }


def crash_at(count: int) -> None:
    """Ends the process just before the count-th of those calls, which stand around every change of what is on disk."""
    left = itertools.count(1)

    def watched(function):
        def call(*args, **kwargs):
            if next(left) == count:
                os._exit(17)
            return function(*args, **kwargs)

        return call

    for holder, name in (
        (files, "write_whole"), (files, "seal"), (files, "sync_directory"), (storage, "write"),
        (Path, "rename"), (Path, "mkdir"), (shutil, "rmtree"), (os, "replace"),
    ):  # fmt: skip
        setattr(holder, name, watched(getattr(holder, name)))


def save_on(directory: str, saves: int, crash: int, keep: int) -> None:
    if crash:
        crash_at(crash)
    checkpoints = Checkpoints(directory, keep_latest=keep, best="val/loss")
    latest = checkpoints.latest()
    step = latest.step if latest else 0
    for _ in range(saves):
        step += 1
        checkpoints.save(state_at(step), position={"next": step}, metrics={"val/loss": abs(step - 5.0)})
    checkpoints.close()


class Saver:
    """Starts children that save, one at a time."""

    def __enter__(self) -> Saver:
        script = [sys.executable, __file__, str(Path(__file__).parents[2])]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        self._process = subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        return self

    def begin(self, directory: Path, saves: int = 1000, crash: int = 0, keep: int = 2) -> int:
        """The pid of a child that has begun to save."""
        line = json.dumps({"directory": str(directory), "saves": saves, "crash": crash, "keep": keep})
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def ended(self) -> int:
        """The wait status of the child, once it has ended."""
        return int(self._process.stdout.readline().split()[1])

    def __exit__(self, *exception: object) -> None:
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


def main() -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            save_on(**json.loads(line))
            os._exit(0)
        print(child, flush=True)
        print(*os.waitpid(child, 0), flush=True)


if __name__ == "__main__":
    main()
