"""Lists of blocks: their form, which the kernels rely on; and that the blocks in them are those that the mask has, never fewer.

The blocks of a call are checked against the oracle's pairs: a full block has all of its pairs, what is in no block has none,
and in partial ones the mask is asked. So a list that is right gives back every pair.
"""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from pallas_kernels.attention import SelectedBlocks, block_mask, masks
from pallas_kernels.attention.block_mask import block_lists
from pallas_kernels.attention.lists import EMPTY, FULL, PARTIAL, BlockLists, Segments, Sizes, compacted, transposed, trimmed
from tests.pallas_kernels.attention import cases, oracle
from tests.pallas_kernels.attention.cases import CASES, Case
from tests.pallas_kernels.attention.implementations import ALIKE
from tests.pallas_kernels.attention.strategies import calls
from tests.pallas_kernels.kernel_base import compiled

BLOCKED = [name for name, case in CASES.items() if case.blocks is not None]


def sizes_of(case: Case) -> Sizes:
    return Sizes(case.q_len, case.kv_len, *(case.blocks or (16, 32)))


def lists_of(case: Case) -> tuple[BlockLists, BlockLists, BlockLists]:
    """By row, transposed, and transposed twice; compiled where they are data."""
    sizes, mask = sizes_of(case), cases.mask_of(case)

    def all_of(offset, segments, mask=mask):
        lists = block_lists(mask, sizes, case.batch, case.q_heads, offset, segments)
        other = transposed(lists, sizes.columns)
        return lists, other, transposed(other, sizes.rows)

    segments = None if case.segments is None else Segments(*(np.array(ids, np.int32) for ids in case.segments))
    if case.traced and case.mask[0] != "selected":
        return compiled(all_of)(cases.offset_of(case), segments)
    if case.mask[0] == "selected":
        return compiled(lambda segments, mask: all_of(cases.offset_of(case), segments, mask))(segments, mask)
    if segments is not None:
        return compiled(lambda segments: all_of(case.offset[0], segments))(segments)
    return all_of(case.offset[0], None)


def has_the_form(lists: BlockLists, rows: int, columns: int) -> None:
    """What BlockLists says of itself."""
    row, column, kind = (np.asarray(x) for x in lists)
    assert row.dtype == column.dtype == kind.dtype == np.int32
    assert row.shape == column.shape == kind.shape and row.ndim == 3
    assert set(np.unique(kind)) <= {EMPTY, PARTIAL, FULL}
    assert (column >= 0).all() and (column < columns).all()
    for b, h in np.ndindex(*row.shape[:2]):
        r, c, k = row[b, h], column[b, h], kind[b, h]
        assert (np.diff(r) >= 0).all() and list(np.unique(r)) == list(range(rows)), "every row occurs, in order"
        same_row = np.diff(r) == 0
        assert (np.diff(c)[same_row & (k[1:] != EMPTY)] > 0).all(), "columns grow within a row, none occurs twice"
        assert not (same_row & (k[:-1] == EMPTY) & (k[1:] != EMPTY)).any(), "EMPTY entries come last in their row"
        follows = k[1:] == EMPTY
        assert (c[1:][follows] == c[:-1][follows]).all(), "nothing is fetched for an EMPTY entry"


def is_short(lists: BlockLists) -> None:
    """No EMPTY entry is there without need: as long as its longest list of blocks and rows without any."""
    n = lists.row.shape[-1]
    pairs = zip(lists.row.reshape(-1, n), lists.kind.reshape(-1, n))
    assert n == max((kind != EMPTY).sum() + len(set(row) - set(row[kind != EMPTY])) for row, kind in pairs)


def blocks_in(lists: BlockLists, b: int = 0, h: int = 0) -> dict[tuple[int, int], int]:
    row, column, kind = (np.asarray(x)[b % len(x), h % x.shape[1]] for x in lists)
    return {(int(r), int(c)): int(k) for r, c, k in zip(row, column, kind) if k != EMPTY}


def check_pairs(case: Case) -> None:
    """The blocks hold every pair that is seen, and full ones no other."""
    (lists, other, back), sizes, seen = lists_of(case), sizes_of(case), cases.seen(case)
    has_the_form(lists, sizes.rows, sizes.columns)
    assert all(isinstance(x, np.ndarray) for x in lists) == (
        not case.traced and case.segments is None and case.mask[0] != "selected"
    )
    for b, h in itertools.product(range(case.batch), range(case.q_heads)):
        listed = blocks_in(lists, b, h)
        rest = seen[b, h].copy()
        for (row, column), kind in listed.items():
            block = rest[
                row * sizes.q_block : (row + 1) * sizes.q_block, column * sizes.kv_block : (column + 1) * sizes.kv_block
            ]
            if kind == FULL:
                assert block.all() and (column + 1) * sizes.kv_block <= sizes.kv_len, f"{row}, {column} is not full"
            block[:] = False
        assert not rest.any(), f"pairs in no block: {np.argwhere(rest)[:4].tolist()}"
    has_the_form(other, sizes.columns, sizes.rows)
    has_the_form(back, sizes.rows, sizes.columns)
    for b, h in np.ndindex(*lists.kind.shape[:2]):
        assert blocks_in(back, b, h) == blocks_in(lists, b, h)
        assert {(c, r): k for (r, c), k in blocks_in(lists, b, h).items()} == blocks_in(other, b, h)
    if isinstance(lists.row, np.ndarray):
        is_short(lists)
        is_short(other)


@pytest.mark.parametrize("name", BLOCKED)
def test_a_calls_blocks_hold_its_pairs(name):
    """Of every case: by row and by column, of masks, offsets, segments and selections."""
    check_pairs(CASES[name])


@settings(max_examples=6)
@given(case=calls())
def test_the_blocks_of_calls_that_hypothesis_makes_hold_their_pairs(case):
    check_pairs(case if case.blocks else case._replace(blocks=(16, 16)))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ())
        for name in BLOCKED
        if CASES[name].mask[0] != "selected" and CASES[name].segments is None
    ],
)
def test_lists_of_data_have_the_blocks_of_known_ones(name):
    """The same offset, known or traced: no block more where bounds are exact, and never one less; full where they are full."""
    case = CASES[name]
    if len(case.offset) > 1:
        case = case._replace(offset=case.offset[:1])
    (known, *_), (data, *_) = lists_of(case._replace(traced=False)), lists_of(case._replace(traced=True))
    exact = cases.made(case.mask).exact
    for b, h in itertools.product(range(case.batch), range(case.q_heads)):
        ours, theirs = blocks_in(known, b, h), blocks_in(data, b, h)
        assert set(ours) <= set(theirs)
        assert all(kind == PARTIAL or ours.get(block) == FULL for block, kind in theirs.items())
        if exact:
            assert ours == theirs


def test_every_sequence_has_the_list_of_its_offset():
    offsets = np.array([0, 5, 40], np.int32)
    mask, sizes = masks.window(9, 0), Sizes(20, 60, 8, 8)
    together = compiled(lambda offsets: block_lists(mask, sizes, 3, 4, offsets, None))(offsets)
    assert together.row.shape[:2] == (3, 1)
    for b, offset in enumerate(offsets):
        alone = block_mask(mask, *sizes, q_offset=int(offset)).lists
        assert blocks_in(together, b) == blocks_in(alone)


def test_segments_leave_out_what_no_pair_of_them_is_in():
    """Contiguous ones exactly; others by the range of their ids. Inside of one segment full blocks stay full."""
    ids = np.repeat([0, 1, 2], [16, 24, 24])[None].astype(np.int32)
    of = {
        name: compiled(lambda ids, mask=mask: block_lists(mask, Sizes(64, 64, 8, 8), 1, 1, 0, Segments(ids, ids)))
        for name, mask in (("full", masks.full()), ("causal", masks.causal()))
    }
    lists = of["full"](ids)
    block_ids = ids[0, ::8]
    assert blocks_in(lists) == {(r, c): FULL for r in range(8) for c in range(8) if block_ids[r] == block_ids[c]}
    half = np.repeat([0, 1], [12, 52])[None].astype(np.int32)
    kinds = blocks_in(of["full"](half))
    assert kinds[0, 0] == FULL and kinds[0, 1] == kinds[1, 1] == kinds[1, 2] == PARTIAL and (0, 2) not in kinds
    causal = blocks_in(of["causal"](half))
    assert causal[3, 3] == PARTIAL and causal[3, 2] == FULL and (3, 0) not in causal


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_selected_blocks_are_listed_once_and_only_if_they_exist(heads):
    index = np.array([[2, 0, 2], [-1, 9, 1], [-1, -1, -5]], np.int32)
    index = np.stack([np.roll(index, h, axis=0) for h in range(heads)])[None]
    sizes = Sizes(20, 24, 8, 8)
    lists = compiled(lambda index: SelectedBlocks(index, 8, 8, masks.full()).lists(1, 4, sizes, 0))(index)
    assert lists.row.shape == (1, 1 if heads == 1 else 4, 3 * 4)
    has_the_form(lists, 3, 3)
    for h in range(4):
        mine = index[0, h // (4 // heads)]
        assert blocks_in(lists, 0, h) == {(r, int(c)): FULL for r in range(3) for c in mine[r] if 0 <= c < 3}
    masked = compiled(lambda index: SelectedBlocks(index, 8, 8, masks.causal()).lists(1, 4, sizes, 0))(index)
    assert set(blocks_in(masked)) == {(r, c) for r, c in blocks_in(lists) if c <= r}


def test_compacting_sorts_and_trimming_shortens():
    """From entries in any order; of several lists the longest decides, the others end with EMPTY entries of their last row."""
    row = np.array([[[2, 0, 2, 0, 1]], [[0, 0, 0, 0, 0]]])
    column = np.array([[[1, 3, 0, 2, 1]], [[3, 2, 1, 0, 0]]])
    kind = np.array([[[1, 2, 1, 1, 0]], [[1, 0, 1, 1, 0]]])
    lists = trimmed(compacted(row, column, kind, 3))
    np.testing.assert_array_equal(lists.row, [[[0, 0, 1, 2, 2]], [[0, 0, 0, 1, 2]]])
    np.testing.assert_array_equal(lists.column, [[[2, 3, 3, 0, 1]], [[0, 1, 3, 3, 3]]])
    np.testing.assert_array_equal(lists.kind, [[[1, 2, 0, 1, 1]], [[1, 1, 1, 0, 0]]])
    shorter = trimmed(compacted(row, column, kind * np.array([0, 1]).reshape(2, 1, 1), 3))
    np.testing.assert_array_equal(shorter.row, [[[0, 1, 2, 2, 2]], [[0, 0, 0, 1, 2]]])
    traced = compiled(lambda *x: compacted(*x, 3))(*map(jnp.asarray, (row, column, kind)))
    for a, b in zip(traced, compacted(row, column, kind, 3), strict=True):
        np.testing.assert_array_equal(a, b)


def test_masks_of_a_step_are_sorted_once_a_value():
    """A call with a mask, instead of its block mask, finds it made."""
    sizes = Sizes(64, 64, 16, 16)
    lists = block_lists(masks.causal() & masks.document(np.arange(64) // 9), sizes, 2, 4, 0, None)
    assert block_lists(masks.causal() & masks.document(np.arange(64) // 9), sizes, 2, 4, 0, None) is lists


def test_ids_of_a_document_beyond_the_last_are_its_last():
    """Where the oracle, the mask and bounds must agree: queries at an offset that is data are not known to end before."""
    seen = oracle.table(["document", [0, 0, 1]], 1, 1, 5, 3)[0, 0]
    assert seen[2:, 2].all() and not seen[:2, 2].any()
    lists = block_lists(masks.document(np.array([0, 0, 1])), Sizes(5, 3, 1, 1), 1, 1, jnp.int32(0), None)
    assert set(blocks_in(lists)) == set(zip(*np.nonzero(seen)))
