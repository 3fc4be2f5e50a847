"""Batches: positions, calls of several steps, and a thread that ends."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from research.core.batches import calls, from_function, open_at, prefetched, together
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


def test_together_they_are_named_and_open_where_they_were():
    both = together({"train": source(), "validation": source()})
    ahead = both.open()
    for _ in range(3):
        next(ahead)
    by_drawing = both._replace(position=None)
    for other in (open_at(both, 3, ahead.get_state()), open_at(both, 3), open_at(by_drawing, 3)):
        assert {name: int(batch["x"][0]) for name, batch in next(other).items()} == {"train": 3, "validation": 3}
    assert len(list(together({"train": source(), "validation": source(2)}).open())) == 2
    assert both.rows is None and both.fingerprint != together({"train": source()}).fingerprint


def test_together_each_goes_on_where_it_was():
    both = together({"train": source(), "validation": source()})
    assert both.position(3) == {"train": source().position(3), "validation": source().position(3)}
    ahead = both.open()
    ahead.set_state({"train": source().position(3), "validation": source().position(1)})
    assert {name: int(batch["x"][0]) for name, batch in next(ahead).items()} == {"train": 3, "validation": 1}


def test_together_there_is_no_short_cut_and_no_cut_by_rows_that_one_of_them_lacks():
    drawn = source()._replace(position=None)
    both = together({"train": source()._replace(rows=lambda start, stop: source()), "validation": drawn})
    assert both.position is None and both.rows is None
    assert {name: int(batch["x"][0]) for name, batch in next(open_at(both, 3)).items()} == {"train": 3, "validation": 3}


def test_together_they_are_cut_by_rows():
    def cut(start, stop):
        return from_function(lambda i: {"x": np.arange(start, stop)})

    parts = {name: cut(0, 4)._replace(rows=cut) for name in ("train", "validation")}
    batch = next(together(parts).rows(1, 3).open())
    assert {name: rows["x"].tolist() for name, rows in batch.items()} == {"train": [1, 2], "validation": [1, 2]}
