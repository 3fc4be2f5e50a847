"""Masks sorted into blocks: what every block is, as the pairs say; values, pictures; nothing of the size of the matrix."""

from __future__ import annotations

import dataclasses
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention import block_mask, masks
from pallas_kernels.attention.block_mask import BlockMask
from pallas_kernels.attention.lists import EMPTY, FULL, PARTIAL
from tests.pallas_kernels.attention import oracle
from tests.pallas_kernels.attention.cases import made, plain
from tests.pallas_kernels.attention.strategies import BLOCKS, BY_HEAD, SHAPES, SPECS
from tests.pallas_kernels.attention.test_masks import SPECIFIED


def sorted_by_hand(seen: np.ndarray, q_block: int, kv_block: int) -> np.ndarray:
    """The kind of every block [rows, columns] of a table of pairs; only a block with all of its keys there can be full."""
    q_len, kv_len = seen.shape
    rows, columns = -(-q_len // q_block), -(-kv_len // kv_block)
    kinds = np.full((rows, columns), EMPTY)
    for row in range(rows):
        for column in range(columns):
            block = seen[row * q_block : (row + 1) * q_block, column * kv_block : (column + 1) * kv_block]
            if block.any():
                kinds[row, column] = FULL if block.all() and (column + 1) * kv_block <= kv_len else PARTIAL
    return kinds


def check(spec, q_len, kv_len, blocks, offset):
    mask = made(spec)
    heads, batch = (4 if mask.heads else 0), (2 if mask.batch else 0)
    bm = block_mask(mask, q_len, kv_len, *blocks, q_offset=offset, heads=heads, batch=batch)
    seen = oracle.table(plain(spec), 2, 4, q_len, kv_len, (offset,))
    padded = np.pad(seen, [(0, 0), (0, 0), (0, blocks[0]), (0, blocks[1])])
    assert (bm.batch, bm.heads) == (max(batch, 1), max(heads, 1)) == bm.lists.kind.shape[:2]
    for b in range(2):
        for h in range(4):
            mine = min(b, bm.batch - 1), min(h, bm.heads - 1)
            table = sorted_by_hand(seen[b, h], *blocks)
            np.testing.assert_array_equal(bm.table(*mine), table)
            patterns, which = bm.patterns
            row, column, kind = (x[mine] for x in bm.lists)
            for r, c, k, p in zip(row, column, kind, which[mine], strict=True):
                if k == PARTIAL:
                    inside = padded[b, h, r * blocks[0] :, c * blocks[1] :][: blocks[0], : blocks[1]]
                    real = min(blocks[0], q_len - r * blocks[0])  # queries beyond the last may be anything
                    np.testing.assert_array_equal(patterns[p][:real], inside[:real])
                    np.testing.assert_array_equal(bm.pairs(r, c, *mine)[:real], inside[:real])
    assert len({p.tobytes() for p in bm.patterns[0]}) == len(bm.patterns[0])
    kinds = np.array([[bm.table(b, h) for h in range(bm.heads)] for b in range(bm.batch)])
    counts = {"partial": (kinds == PARTIAL).sum(), "full": (kinds == FULL).sum(), "all": kinds.size}
    assert bm.counts() == counts and bm.density == (kinds != EMPTY).mean()


@pytest.mark.parametrize("name", [name for name, spec in SPECIFIED.items() if (made(spec).length or 13) >= 13])
@pytest.mark.parametrize("q_len, kv_len, blocks, offset", [(13, 13, (4, 3), 0), (5, 13, (4, 5), 7), (13, 4, (3, 8), 0)])
def test_every_block_is_what_its_pairs_say(name, q_len, kv_len, blocks, offset):
    """Empty, partial or full, by looking at all pairs; also what partial ones look like, at odd lengths and offsets."""
    check(SPECIFIED[name], q_len, kv_len, blocks, offset)


@settings(max_examples=40)
@given(spec=SPECS | BY_HEAD, shape=st.sampled_from(SHAPES), blocks=st.sampled_from(BLOCKS), offset=st.sampled_from([0, 36]))
def test_what_hypothesis_combines_is_sorted_as_its_pairs_say(spec, shape, blocks, offset):
    check(spec, *shape, blocks, offset)


EQUIVALENTS = {
    "causal": (masks.causal(), lambda b, h, q, kv: kv <= q),
    "window": (masks.window(40, 7), lambda b, h, q, kv: (q - 40 <= kv) & (kv <= q + 7)),
    "prefix": (masks.causal() | masks.prefix(30), lambda b, h, q, kv: (kv <= q) | (kv < 30)),
    "strided": (masks.strided(9), lambda b, h, q, kv: (q - kv) % 9 == 0),
    "global": (masks.global_tokens([3, 150]), lambda b, h, q, kv: (q == 3) | (kv == 3) | (q == 150) | (kv == 150)),
    "documents": (masks.document(np.arange(200) // 41), lambda b, h, q, kv: q // 41 == kv // 41),
    "heads": (masks.per_head(masks.causal(), masks.full()), lambda b, h, q, kv: (kv <= q) | (h == 1)),
}


@pytest.mark.parametrize("name", EQUIVALENTS)
def test_a_function_is_sorted_as_the_mask_that_it_equals(name):
    """Bounds say of a rectangle what looking at each pair says."""
    built_in, function = EQUIVALENTS[name]
    arguments = {"heads": 2} if built_in.heads else {}
    ours, theirs = (block_mask(m, 200, 200, 16, 32, **arguments).lists for m in (built_in, masks.from_function(function)))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_function_of_heads_and_sequences_has_a_list_for_each():
    mask = masks.from_function(lambda b, h, q, kv: kv <= q - 8 * h - 16 * b)
    bm = block_mask(mask, 64, 64, 8, 8, heads=3, batch=2)
    assert bm.lists.kind.shape[:2] == (2, 3)
    assert len({bm.table(b, h).tobytes() for b in range(2) for h in range(3)}) == 5  # (0, 2) is (1, 0)
    np.testing.assert_array_equal(bm.table(0, 2), bm.table(1, 0))
    assert block_mask(masks.from_function(lambda b, h, q, kv: kv <= q), 64, 64, 8, 8, heads=3).lists.kind.shape[:2] == (1, 1)


def test_how_many_heads_there_are_has_to_be_said_and_to_fit():
    looking = masks.from_function(lambda b, h, q, kv: kv <= q + h + b)
    with pytest.raises(ValueError, match="block_mask's heads: got 0, wanted how many there are"):
        block_mask(looking, 8, 8, 4, 4, batch=1)
    with pytest.raises(ValueError, match="block_mask's batch: got 0, wanted how many there are"):
        block_mask(looking, 8, 8, 4, 4, heads=1)
    with pytest.raises(ValueError, match="it is one of 2 heads, and there are 3"):
        block_mask(masks.per_head(masks.causal(), masks.full()), 8, 8, 4, 4, heads=3)
    for name in ("q_len", "kv_len", "q_block", "kv_block"):
        with pytest.raises(ValueError, match=f"block_mask's {name}: got 0, wanted a whole number >= 1"):
            block_mask(masks.causal(), **{"q_len": 8, "kv_len": 8, name: 0})


def test_a_mask_does_not_go_on_beyond_its_positions():
    documents = masks.causal() & masks.document(np.arange(12) // 5)
    assert block_mask(documents, 4, 12, 4, 4, q_offset=8).counts()["all"] == 3
    for q_len, kv_len, offset in ((4, 13, 0), (13, 4, 0), (5, 12, 8)):
        with pytest.raises(ValueError, match="^mask: got one of 12 positions, wanted 13, those of the keys and of queries"):
            block_mask(documents, q_len, kv_len, 4, 4, q_offset=offset)


def test_equal_arguments_give_one_value_whose_lists_are_made_once():
    ids = np.arange(72) // 10
    one = block_mask(masks.document(ids) & masks.causal(), 64, 64, 8, 8)
    again = block_mask(masks.document(ids.copy()) & masks.causal(), 64, 64, 8, 8)
    assert one is again and one.lists is again.lists
    apart = BlockMask(one.mask, one.sizes, one.heads, one.batch, one.q_offset)
    assert apart == one and hash(apart) == hash(one) and apart is not one
    others = [
        block_mask(masks.document(ids), 64, 64, 8, 8),
        block_mask(one.mask, 64, 64, 8, 16),
        block_mask(one.mask, 64, 56, 8, 8),
        block_mask(one.mask, 64, 64, 8, 8, q_offset=8),
    ]
    assert len({one, *others}) == 5


def test_printed_it_is_a_picture():
    bm = block_mask(masks.causal(), 35, 40, 10, 10)
    assert str(bm).splitlines() == [
        "BlockMask(causal(), 35 x 40 in blocks of 10 x 10: 10 of 16 not empty, 62.5%; 6 full)",
        "",
        "▒···",
        "█▒··",
        "██▒·",
        "███▒",
    ]
    by_head = str(block_mask(masks.per_head(masks.full(), masks.window(0, 0)), 20, 20, 10, 10))
    assert by_head.split("\n\n")[1:] == ["sequence 0, head 0:\n██\n██", "sequence 0, head 1:\n▒·\n·▒"]
    assert ", 1 x 2 lists: 6 of 8 not empty, 75.0%; 4 full)" in by_head


def test_a_large_picture_stays_one():
    """At most 64 cells either way; a cell is full, or empty, only if all of its blocks are."""
    rows = str(block_mask(masks.causal(), 2000, 2000, 10, 10)).splitlines()[2:]
    assert len(rows) == 64 and {len(row) for row in rows} == {64}
    for i, row in enumerate(rows):
        assert row == "█" * i + "▒" + "·" * (63 - i)


LONG = 131_072
HUGE = {
    "causal": (masks.causal(), LONG, LONG),
    "window": (masks.window(512, 0), LONG, LONG),
    "window and global": (masks.causal() & (masks.window(1024, 0) | masks.global_tokens(64)), LONG, LONG),
    "window and global positions": (masks.window(512, 512) | masks.global_tokens([0, 70_000]), LONG, LONG),
    "bigbird": (masks.bigbird(0, 128, LONG), LONG, LONG),
    "documents": (masks.causal() & masks.document(np.arange(LONG) // 3000), LONG, LONG),
    "complement of documents": (~masks.document(np.arange(LONG) // 3000), LONG, LONG),
}


@pytest.mark.parametrize("name", HUGE)
def test_131072_tokens_are_sorted_without_their_matrix(name):
    """16 GiB of bool would be needed for it; the limit is a byte for 80 pairs. It would take minutes if it grew with pairs."""
    mask, q_len, kv_len = HUGE[name]
    tracemalloc.start()
    start = time.perf_counter()
    try:
        bm = dataclasses.replace(block_mask(mask, q_len, kv_len, 128, 128))  # a new one, whose lists nobody asked for
        counts = bm.counts()
        seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200e6, f"{peak / 1e6:.0f} MB"
    assert seconds < 60
    n = LONG // 128
    if name == "causal":
        assert counts == {"partial": n, "full": n * (n - 1) // 2, "all": n * n}
    if name == "window":
        assert counts == {"partial": 2 * n - 4, "full": 3 * n - 6, "all": n * n}
