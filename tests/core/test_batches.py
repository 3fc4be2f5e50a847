"""Batches: positions, calls of several steps, and a thread that ends."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from research.core.batches import calls, from_function, open_at, prefetched
from research.core.types import Batches


def source(length=None):
    return from_function(lambda i: {"x": np.array([i])}, length)


def taken(iterator, n):
    return [int(next(iterator)["x"][0]) for _ in range(n)]


@pytest.mark.parametrize("step", [0, 1, 5])
def test_a_position_computed_saved_or_reached_by_drawing_is_the_same(step):
    drawn = source().open()
    taken(drawn, step)
    saved = drawn.get_state()
    by_drawing = Batches(source().open, "no short cut")
    for iterator in (open_at(source(), step), open_at(source(), step, saved), open_at(by_drawing, step), drawn):
        assert taken(iterator, 3) == [step, step + 1, step + 2]


def test_calls_are_aligned_and_carry_the_position_after_them():
    made = list(calls(open_at(source(), 2), 2, 9, 3, lambda x: x))
    assert [c.length for c in made] == [1, 3, 3]
    assert [c.batches["x"][:, 0].tolist() for c in made] == [[2], [3, 4, 5], [6, 7, 8]]
    assert [c.position["next_index"] for c in made] == [3, 6, 9]


def test_batches_that_end_early_are_an_error_with_the_step():
    with pytest.raises(ValueError, match="ended after 5 of 9 steps"):
        list(calls(source(5).open(), 0, 9, 2, lambda x: x))


def test_prefetching_keeps_the_order_and_ends_its_thread():
    assert list(prefetched(iter(range(20)), depth=3)) == list(range(20))
    endless = prefetched(iter(source().open()))
    next(endless)
    endless.close()
    assert not any(t.name == "prefetch" for t in threading.enumerate())


def test_what_the_thread_raises_comes_in_its_place():
    def items():
        yield 1
        raise RuntimeError("broken")

    drawn = prefetched(items())
    assert next(drawn) == 1
    with pytest.raises(RuntimeError, match="broken"):
        next(drawn)
