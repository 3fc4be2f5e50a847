"""Hashes tell contents apart; permutations are permutations, the same everywhere."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from research.data.determinism import digest, generator, mixed, permutation


def test_digests_tell_contents_apart():
    x = np.arange(6, dtype=np.int32)
    contents = [(), (x,), (x.reshape(2, 3),), (x.reshape(3, 2),), (x.astype(np.uint32),), (x.view(np.float32),), (x[:0],),
                (x[1:],),
                (x[:3], x[3:]), (x.tobytes(),), ("a",), (b"a",), ("a", "b"), ("ab",), (1,), ("1",), (1.0,)]  # fmt: skip
    assert len({digest(*parts) for parts in contents}) == len(contents)
    assert digest(x.reshape(2, 3).T) == digest(np.ascontiguousarray(x.reshape(2, 3).T))


@given(st.integers(0, 300), st.integers(-(2**70), 2**70), st.integers(0, 5))
def test_a_permutation_is_one_and_read_only(count, seed, epoch):
    order = permutation(count, seed, epoch)
    assert sorted(order.tolist()) == list(range(count)) and order.dtype == np.int64
    assert not order.flags.writeable


def test_every_place_is_as_likely_as_any_other():
    counts = np.zeros((6, 6))
    for seed in range(3000):
        counts[np.arange(6), permutation(6, seed)] += 1
    assert abs(counts - 500).max() < 100  # 4.9 standard deviations


def test_numbers_are_pinned_and_neighbours_unrelated():
    assert mixed(0, 1) == 48314778254439119075357226363219004069
    assert generator(1, 2).integers(2**62) != generator(2, 1).integers(2**62)
