"""SIGTERM and Ctrl-C: an event between steps, an exception elsewhere."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(KeyboardInterrupt):
    """A SIGTERM or Ctrl-C outside of the steps. `code`: the exit code that it asks for, 128 + the signal's number."""

    def __init__(self, signum: int):
        super().__init__(f"{signal.Signals(signum).name}")
        self.code = 128 + signum


class _Handler:
    """What a signal does. `asked` is set by the first; where `raising`, it raises too, else only a second Ctrl-C does."""

    def __init__(self, asked: threading.Event, raising: bool):
        self.asked, self.raising = asked, raising

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        again = self.asked.is_set() and signum == signal.SIGINT
        self.asked.set()
        if self.raising or again:
            raise Interrupted(signum)


@contextlib.contextmanager
def interrupts(raising: bool = False) -> Iterator[threading.Event]:
    """An event set by the first SIGTERM or Ctrl-C; a second Ctrl-C raises `Interrupted`, and where `raising`, every one does.

    Nested, they share their event: a signal whose exception was lost, as Python loses those that come in a callback, still
    ends the steps at once. Signals reach the main thread alone; elsewhere the event is never set.
    """
    if threading.current_thread() is not threading.main_thread():
        yield threading.Event()
        return
    before = {s: signal.getsignal(s) for s in SIGNALS}
    around = before[signal.SIGTERM]
    asked = around.asked if isinstance(around, _Handler) else threading.Event()
    try:
        for s in SIGNALS:
            signal.signal(s, _Handler(asked, raising))
        yield asked
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
