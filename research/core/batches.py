"""Batches from plain functions, and drawing them ahead of time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from research.core.types import Batch, Batches, BatchIterator

T = TypeVar("T")


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


class _TogetherIterator:
    def __init__(self, iterators: Mapping[str, BatchIterator]):
        self._iterators = iterators

    def __iter__(self) -> _TogetherIterator:
        return self

    def __next__(self) -> Batch:
        return {name: next(iterator) for name, iterator in self._iterators.items()}

    def get_state(self) -> Mapping[str, Any]:
        return {name: dict(iterator.get_state()) for name, iterator in self._iterators.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        for name, iterator in self._iterators.items():
            iterator.set_state(state[name])


def together(parts: Mapping[str, Batches]) -> Batches:
    """Batches {name: the next batch of parts[name]}, such as {"train", "validation"}; they end where the first of them does.
    Cut by rows, each part is, where all can be: their batches must then have equally many."""
    name = "; ".join(f"{name}: ({part.fingerprint})" for name, part in parts.items())
    positions = {name: part.position for name, part in parts.items()}
    cuts = {name: part.rows for name, part in parts.items()}

    def position(step: int) -> Mapping[str, Any]:
        return {name: at(step) for name, at in positions.items() if at}

    def rows(start: int, stop: int) -> Batches:
        return together({name: cut(start, stop) for name, cut in cuts.items() if cut})

    return Batches(
        lambda: _TogetherIterator({name: part.open() for name, part in parts.items()}),
        name,
        position if all(positions.values()) else None,
        rows if all(cuts.values()) else None,
    )


def nothing() -> Batches:
    """Endless batches of no arrays, for tasks that draw what they learn from inside the step (`transforms.drawn`, `unroll`)."""
    return from_function(lambda _: {}, fingerprint="nothing")


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


class Call(NamedTuple):
    """The batches of one compiled call, stacked, and the iterator's position after them."""

    batches: Batch
    length: int
    position: Mapping[str, Any]


def calls(iterator: BatchIterator, step: int, steps: int, per_call: int, put: Callable[[Batch], Batch]) -> Iterator[Call]:
    """Draws from `step` to `steps`, `per_call` batches at a time where they fit, aligned to its multiples, else one; host
    batches with a new leading axis go through `put`. Raises ValueError where the batches end early."""
    while step < steps:
        n = per_call if step % per_call == 0 and step + per_call <= steps else 1
        drawn = []
        for i in range(n):
            try:
                drawn.append(next(iterator))
            except StopIteration:
                raise ValueError(f"the batches ended after {step + i} of {steps} steps") from None
        yield Call(put(jax.tree.map(lambda *xs: np.stack(xs), *drawn)), n, dict(iterator.get_state()))
        step += n


def prefetched(items: Iterator[T], depth: int = 2) -> Generator[T, None, None]:
    """The same items, up to `depth` made ahead in a thread. What the thread raises is raised here, in its place; closing the
    generator ends the thread."""
    ready: queue.Queue = queue.Queue(maxsize=depth)
    closed, end = threading.Event(), object()

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
            for item in items:
                if not offer((item, None)):
                    return
            offer((end, None))
        except BaseException as error:  # handed over, not handled
            offer((end, error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        closed.set()
        thread.join()
