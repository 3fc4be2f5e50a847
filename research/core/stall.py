"""What every thread is doing, where nothing has moved for too long."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Mapping
from typing import Any, TextIO

from research.core import processes
from research.core.hooks import Hook
from research.core.types import Learner


def stacks() -> str:
    """The stack of every thread of this process, the innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames().items()
    return "\n".join(f"thread {names.get(i, i)}:\n{''.join(traceback.format_stack(f)).rstrip()}" for i, f in frames)


class Stall(Hook):
    """Reports the stacks of this process, once each time that it has taken no step, logged and measured nothing for `after`
    seconds; the run goes on. Each of several processes reports itself, since all wait for the slowest.

    Compiling, and an evaluation, must take less. out: default standard error.
    """

    def __init__(self, after: float, out: TextIO | None = None):
        if after <= 0:
            raise ValueError(f"stall: after={after}; allowed: more than 0 seconds")
        self._after, self._out = after, out
        self._thread: threading.Thread | None = None
        self._over = threading.Event()
        self._moved, self._step, self._told = 0.0, 0, False

    def _move(self, step: int) -> None:
        self._moved, self._step, self._told = time.monotonic(), step, False

    def start(self, step: int, steps: int, learner: Learner, stage: int = 0) -> None:
        self.close()
        self._move(step)
        self._over.clear()
        self._thread = threading.Thread(target=self._watch, name="stall", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(min(self._after / 4, 1.0)):
            if time.monotonic() - self._moved > self._after and not self._told:
                self._told = True
                who = f"process {processes.index()} of {processes.count()}"
                report = f"{who}: nothing for {self._after:g} s since step {self._step}\n{stacks()}"
                print(report, file=self._out or sys.stderr, flush=True)

    def step(self, step: int) -> None:
        self._move(step)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._move(step)

    def evaluating(self, step: int, prefix: str) -> None:
        self._move(step)

    def evaluated(self, step: int, prefix: str, values: Mapping[str, Any]) -> None:
        self._move(step)

    def saved(self, step: int) -> None:
        self._move(step)

    def close(self) -> None:
        if self._thread is not None:
            self._over.set()
            self._thread.join()
            self._thread = None
