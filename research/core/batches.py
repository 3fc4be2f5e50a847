"""Batches from plain functions, and moving them to the device ahead of time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from research.core.types import Batch, Batches, BatchIterator


class _FunctionIterator:
    def __init__(self, function: Callable[[int], Batch], length: int | None):
        self._function, self._length, self._next = function, length, 0

    def __iter__(self) -> _FunctionIterator:
        return self

    def __next__(self) -> Batch:
        if self._length is not None and self._next >= self._length:
            raise StopIteration
        self._next += 1
        return self._function(self._next - 1)

    def get_state(self) -> Mapping[str, Any]:
        return {"next_index": self._next}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._next = int(state["next_index"])


def from_function(function: Callable[[int], Batch], length: int | None = None, fingerprint: str = "") -> Batches:
    """Batches whose i-th is `function(i)`; endless unless `length` is given."""
    name = fingerprint or f"function {getattr(function, '__qualname__', type(function).__name__)} length {length}"
    return Batches(lambda: _FunctionIterator(function, length), name, lambda step: {"next_index": step})


def open_at(batches: Batches, step: int, position: Mapping[str, Any] | None = None) -> BatchIterator:
    """An iterator that has given `step` batches: at `position` if one was saved, else by the source's own short cut, else by
    drawing and dropping."""
    iterator = batches.open()
    if position is not None:
        iterator.set_state(position)
    elif step and batches.position is not None:
        iterator.set_state(batches.position(step))
    else:
        for _ in range(step):
            next(iterator)
    return iterator


class Drawn(NamedTuple):
    """A batch and the iterator's position after it."""

    batch: Batch
    position: Mapping[str, Any]


def prefetched(iterator: BatchIterator, put: Callable[[Batch], Batch], depth: int = 2) -> Iterator[Drawn]:
    """Draws and `put`s up to `depth` batches ahead in a thread. What the thread raises is raised here, in order; closing the
    generator ends the thread."""
    ready: queue.Queue = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def offer(item: Any) -> bool:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            while True:
                batch = next(iterator)
                if not offer(Drawn(put(batch), dict(iterator.get_state()))):
                    return
        except BaseException as error:  # handed over, StopIteration included
            offer(error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, StopIteration):
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()
