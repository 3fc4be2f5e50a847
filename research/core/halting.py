"""One boundary at which all processes halt, once any of them is asked to.

The process that was asked says so in the key-value store, at its next boundary. A thread in every process waits there for it;
told, it holds its process at the boundary it has come to, gives that boundary's number to the others, and learns the largest:
the one after it is where all halt. No process waits for another's main thread, which may itself be waiting in a collective.
"""

from __future__ import annotations

import atexit
import functools
import threading
from collections.abc import Callable

import jax

from research.core import processes

_ASKED, _ENDED = "asked", "ended"


def _key(index: int) -> str:
    return f"gnomon/halting/{index}"


class _Agreement:
    """What `agreed` gives, where there are several processes: one for as long as the process lives."""

    def __init__(self) -> None:
        self.asked, self._said = threading.Event(), False
        self._lock = threading.Lock()
        self._passed = 0  # boundaries, counted alike in all processes
        self._last: int | None = None  # the one after which all halt
        self._thread = threading.Thread(target=self._listen, name="halting", daemon=True)
        self._thread.start()
        atexit.register(self._end)

    def __call__(self) -> bool:
        if self.asked.is_set() and not self._said:
            self._said = True
            for i in range(processes.count()):
                processes.store().key_value_set(_key(i), _ASKED, allow_overwrite=True)
        with self._lock:
            self._passed += 1
            return self._last is not None and self._passed > self._last

    def _listen(self) -> None:
        try:
            if processes.store().blocking_key_value_get(_key(processes.index()), processes.FOREVER) == _ASKED:
                with self._lock:
                    self._last = processes.exchange("halt", self._passed, max)
        except jax.errors.JaxRuntimeError:
            return  # the store is gone with process 0, and this process ends of that

    def _end(self) -> None:
        """A thread that waits in C++ must not outlive Python."""
        processes.store().key_value_set(_key(processes.index()), _ENDED, allow_overwrite=True)
        self._thread.join()


_agreement = functools.cache(_Agreement)


def agreed(asked: threading.Event) -> Callable[[], bool]:
    """What tells at each boundary whether to halt there; to be called once at each, in every process.

    Once `asked` is set in any process, all are told True at the same boundary: the first that none had come to when all knew.
    """
    if processes.count() == 1:
        return asked.is_set
    agreement = _agreement()
    agreement.asked = asked
    return agreement
