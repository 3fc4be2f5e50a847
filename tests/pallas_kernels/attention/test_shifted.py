"""Masks of pieces say what the whole mask says there, and are equal where it plainly says the same."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.attention import block_mask, masks
from pallas_kernels.attention.shifted import NOTHING, bounds_of_all, shifted, simplified
from tests.pallas_kernels.attention.cases import made
from tests.pallas_kernels.attention.strategies import BY_HEAD, SPECS

LENGTH, PIECE = 96, 16


def pairs(mask, q_first=0, kv_first=0, q_len=PIECE, kv_len=PIECE):
    """bool [2, 4, q_len, kv_len]."""
    index = np.ix_(np.arange(2), np.arange(4), q_first + np.arange(q_len), kv_first + np.arange(kv_len))
    return np.broadcast_to(mask(*index), (2, 4, q_len, kv_len))


@given(SPECS | BY_HEAD, st.integers(0, LENGTH - PIECE), st.integers(0, LENGTH - PIECE), st.integers(0, 20))
def test_a_piece_sees_what_the_whole_sees_there(spec, q_by, kv_by, more):
    mask = made(spec)
    expected = pairs(mask, q_by, kv_by)
    moved = shifted(mask, q_by, kv_by)
    assert moved.heads == mask.heads and moved.batch == mask.batch
    assert moved.length is None or moved.length >= PIECE
    for found in (moved, simplified(moved, PIECE, PIECE)):
        np.testing.assert_array_equal(pairs(found), expected)
        (some,), (every,) = bounds_of_all(found, *(np.array([end]) for end in (0, PIECE - 1) * 2))
        assert some or not expected.any()
        assert not every or expected.all()
    before = max(more - min(q_by, kv_by), -min(q_by, kv_by))
    np.testing.assert_array_equal(pairs(shifted(moved, before, before), -before, -before), expected)


@pytest.mark.parametrize(
    "mask, one, other",
    [
        (masks.causal(), (32, 32), (64, 64)),
        (masks.window(20, 3), (32, 16), (80, 64)),
        (masks.window(5, 0) | masks.global_tokens(4), (32, 0), (64, 0)),
        (masks.window(5, 0) | masks.global_tokens(4), (32, 32), (64, 64)),
        (masks.causal() & masks.strided(7), (16, 0), (64, 48)),
        (masks.block_window(16, 1, 0), (32, 16), (64, 48)),
        (masks.per_head(masks.causal(), masks.window(5, 0)), (32, 32), (64, 64)),
    ],
)
def test_pieces_of_which_a_mask_says_the_same_have_equal_masks(mask, one, other):
    assert simplified(shifted(mask, *one), PIECE, PIECE) == simplified(shifted(mask, *other), PIECE, PIECE)


def test_what_decides_nothing_falls_away():
    assert simplified(masks.causal() | masks.prefix(4), PIECE, PIECE) == masks.causal() | masks.prefix(4)
    assert simplified(shifted(masks.causal() | masks.prefix(4), 16, 16), PIECE, PIECE) == masks.causal()
    assert simplified(shifted(masks.causal(), 16, 0), PIECE, PIECE) == masks.full()
    assert simplified(shifted(masks.causal(), 0, 16), PIECE, PIECE) == NOTHING
    assert simplified(shifted(masks.document(np.arange(96) // 32), 40, 48), PIECE, PIECE) == masks.full()


def test_a_piece_of_documents_has_as_many_positions_as_are_left():
    moved = shifted(masks.document(np.arange(LENGTH) // 10), 80, 48)
    assert moved.length == PIECE
    with pytest.raises(ValueError, match="mask: got one of 16 positions, wanted 17"):
        block_mask(moved, 17, 16)
