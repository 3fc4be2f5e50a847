"""Costs are counts: what a walk through the grid, point by point, visits and fetches."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import block_mask, masks, tpu
from pallas_kernels.attention.block_mask import SelectedBlocks, block_lists
from pallas_kernels.attention.cost import Cost, cost
from pallas_kernels.attention.lists import EMPTY, BlockLists, Segments, Sizes, transposed

BATCH, HEADS, D_QK, D_V = 2, 4, 24, 40
SIZES = Sizes(70, 90, 16, 8)
PICKS = np.random.default_rng(0).integers(-1, 12, (BATCH, 2, SIZES.rows, 3)).astype(np.int32)
IDS = np.sort(np.random.default_rng(1).integers(0, 4, (BATCH, 90)), axis=-1).astype(np.int32)


BY_HEAD = (masks.causal(), masks.full(), masks.window(5, 5), ~masks.causal())


def listed(mask, q_offset=0, segments=None) -> BlockLists:
    lists = jax.jit(lambda offset: block_lists(mask, SIZES, BATCH, HEADS, offset, segments))
    known = isinstance(q_offset, int) and segments is None and not isinstance(mask, SelectedBlocks)
    return block_lists(mask, SIZES, BATCH, HEADS, q_offset, None) if known else lists(jnp.asarray(q_offset, jnp.int32))


WALKED = {
    "causal": lambda: listed(masks.causal()),
    "window, far away": lambda: listed(masks.window(9, 3), 40),
    "nothing": lambda: listed(~masks.full()),
    "by head": lambda: listed(masks.per_head(*BY_HEAD)),
    "by sequence": lambda: listed(masks.document(IDS)),
    "first and last block": lambda: listed(masks.prefix(8) | ~masks.prefix(81)),
    "offsets that are data": lambda: listed(masks.window(20, 0), np.array([3, 30], np.int32)),
    "segments": lambda: listed(masks.causal(), 0, Segments(IDS[:, :70], IDS)),
    "selected": lambda: listed(SelectedBlocks(PICKS, 16, 8, masks.full())),
    "selected by key head": lambda: BlockLists(*(x[:, ::2] for x in listed(SelectedBlocks(PICKS, 16, 8, masks.causal())))),
}


OF_TWO = "selected by key head"
lists_named = functools.cache(lambda name: WALKED[name]())


class Memory:
    """Counts what a kernel fetches and writes whose operands' blocks are told at every grid point."""

    def __init__(self):
        self.held, self.fetched = {}, {}

    def at(self, **blocks):
        for name, block in blocks.items():
            if self.held.get(name) != block:
                self.held[name] = block
                self.fetched[name] = self.fetched.get(name, 0) + 1


def walked(lists: BlockLists, kv_heads: int, backward: bool) -> tuple[dict[str, int], int, int]:
    """(how often each operand's and output's block changes, grid points, those that compute), one point after the other."""
    memory, points, visited = Memory(), 0, 0
    lists = transposed(lists, SIZES.columns) if backward else lists
    lists = BlockLists(*map(np.asarray, lists))
    group, (list_batch, list_heads, n) = HEADS // kv_heads, lists.row.shape
    inner = group if backward and list_heads < HEADS else 1
    for b in range(BATCH):
        for o in range(HEADS // inner):
            memory.held.pop("dq", None)  # it is written out at the end of a list
            for i in range(n):
                for g in range(inner):
                    h = o * inner + g
                    entry = b % list_batch, h // (HEADS // list_heads), i
                    row, column, kind = int(lists.row[entry]), int(lists.column[entry]), int(lists.kind[entry])
                    points += 1
                    visited += kind != EMPTY
                    kv = h // group
                    if not backward:
                        memory.at(q=(b, h, row), k=(b, kv, column), v=(b, kv, column), out=(b, h, row), lse=(b, h, row))
                        continue
                    query = b, h, column
                    memory.at(q=query, do=query, lse=query, delta=query, k=(b, kv, row), v=(b, kv, row))
                    memory.at(dk=(b, o, row), dv=(b, o, row))
                    if kind != EMPTY:
                        memory.at(dq=query)
    return memory.fetched, points, visited


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", [name for name in WALKED if name != OF_TWO])
def test_costs_are_what_a_walk_through_the_grid_counts(name, kv_heads, backward):
    """Grid points, those that compute, and every operand's blocks; and operations and bytes, from these."""
    check(name, kv_heads, backward)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_costs_of_lists_of_key_heads_are_what_a_walk_counts(backward):
    check(OF_TWO, 2, backward)


def check(name, kv_heads, backward):
    lists = lists_named(name)
    arguments = {"batch": BATCH, "q_heads": HEADS, "kv_heads": kv_heads, "d_qk": D_QK, "d_v": D_V, "dtype": jnp.bfloat16}
    got = cost(lists, SIZES, **arguments, backward=backward)
    blocks, points, visited = walked(lists, kv_heads, backward)
    assert (got.grid_points, got.visited) == (points, visited)
    moved = {name: blocks.get(name, 0) for name in (*got.fetched, *got.written)}
    assert {**got.fetched, **got.written} == moved
    q, kv = SIZES.q_block, SIZES.kv_block
    half = {"q": q * D_QK, "k": kv * D_QK, "v": kv * D_V, "out": q * D_V, "do": q * D_V}
    single = {"lse": q, "delta": q, "dq": q * D_QK, "dk": kv * D_QK, "dv": kv * D_V}
    size = {name: 2 * n for name, n in half.items()} | {name: 4 * n for name, n in single.items()}
    assert got.bytes_read == sum(moved[name] * size[name] for name in got.fetched)
    assert got.bytes_written == sum(moved[name] * size[name] for name in got.written)
    products = [D_QK, D_V, D_V, D_QK, D_QK] if backward else [D_QK, D_V]
    assert got.flops == visited * sum(2 * q * kv * d for d in products)
    assert got.exps == visited * (q * kv + (0 if backward else q))
    assert got.entries == (transposed(lists, SIZES.columns) if backward else lists).row.size


def test_a_causal_mask_of_128k_costs_what_its_formula_says():
    """Of 1,024 x 1,024 blocks those on and below the diagonal; a row's keys start anew, but for the first two."""
    n, block = 1024, 128
    got = cost(
        block_mask(masks.causal(), n * block, n * block, block, block),
        batch=1, q_heads=1, kv_heads=1, d_qk=128, d_v=128, dtype=jnp.bfloat16,
    )  # fmt: skip
    blocks = n * (n + 1) // 2
    assert isinstance(got, Cost) and got.visited == got.grid_points == got.entries == blocks
    assert got.flops == 4 * blocks * block * block * 128
    assert got.fetched == {"q": n, "k": blocks - 1, "v": blocks - 1}  # row 0 ends with the block that row 1 starts with


def test_heads_that_share_keys_fetch_a_common_block_once():
    """One block of keys in all: heads of a group find it there."""
    one = block_mask(masks.full(), 16, 16, 16, 16)
    arguments = {"batch": 1, "q_heads": 6, "d_qk": 8, "d_v": 8, "dtype": jnp.float32}
    assert cost(one, kv_heads=2, **arguments).fetched == {"q": 6, "k": 2, "v": 2}
    assert cost(one, kv_heads=6, **arguments).fetched == {"q": 6, "k": 6, "v": 6}
    back = cost(one, kv_heads=2, **arguments, backward=True)
    assert back.written == {"dk": 2, "dv": 2, "dq": 6} and back.grid_points == 6


@pytest.mark.parametrize("change, says", [
    ({"batch": 0}, "^batch: got 0, wanted a whole number >= 1$"),
    ({"d_qk": -8}, "^d_qk: got -8, wanted a whole number >= 1$"),
    ({"d_v": 8.0}, "^d_v: got 8.0, wanted a whole number >= 1$"),
    ({"kv_heads": True}, "^kv_heads: got True, wanted a whole number >= 1$"),
    ({"q_heads": 5}, "^q_heads: got 5, wanted a multiple of kv_heads, 2$"),
])  # fmt: skip
def test_sizes_that_no_call_has_are_refused(change, says):
    arguments = {"batch": 1, "q_heads": 4, "kv_heads": 2, "d_qk": 8, "d_v": 8, "dtype": jnp.float32}
    with pytest.raises(ValueError, match=says):
        cost(block_mask(masks.causal(), 16, 16, 16, 16), **arguments | change)


def test_lists_that_do_not_fit_the_call_are_refused():
    bm = block_mask(masks.per_head(*[masks.causal()] * 3), 32, 32, 16, 16)
    arguments = {"batch": 1, "kv_heads": 2, "d_qk": 8, "d_v": 8, "dtype": jnp.float32}
    with pytest.raises(ValueError, match="q_heads: got 4, and there are lists for 3"):
        cost(bm, q_heads=4, **arguments)
    with pytest.raises(ValueError, match="sizes: got None"):
        cost(bm.lists, q_heads=3, **arguments)


@pytest.mark.parametrize(
    "name, kv_heads",
    [("causal", 1), pytest.param("by head", 2, marks=pytest.mark.slow), pytest.param("segments", 1, marks=pytest.mark.slow)],
)
@pytest.mark.slow
def test_the_tpus_kernel_goes_through_the_grid_that_is_counted(name, kv_heads):
    """Interpreted, it tells every grid point that it comes by, forward and backward."""
    sizes, heads, points = Sizes(20, 24, 16, 8), 2, []

    def record(token, point, core):
        points.append(tuple(map(int, point)))
        return token

    interpret = pltpu.InterpretParams(grid_point_recorder=record)
    masked = {"causal": masks.causal(), "segments": masks.causal(), "by head": masks.per_head(masks.causal(), ~masks.causal())}[
        name
    ]
    segments = Segments(IDS[:, 30:50], IDS[:, 30:54]) if name == "segments" else None
    mask = block_mask(masked, *sizes)
    shapes = {"q": (BATCH, 20, heads, 8), "k": (BATCH, 24, kv_heads, 8), "v": (BATCH, 24, kv_heads, 8)}
    q, k, v = (jnp.ones(shape) for shape in shapes.values())

    def call(q, k, v):
        arguments = dict.fromkeys(("score_mod", "sinks", "softcap"))
        return tpu.attend(q, k, v, mask, q_offset=0, segment_ids=segments, scale=1.0, interpret=interpret, **arguments)

    values, pull = jax.vjp(call, q, k, v)
    jax.block_until_ready(pull(values))
    arguments = {"batch": BATCH, "q_heads": heads, "kv_heads": kv_heads, "d_qk": 128, "d_v": 128, "dtype": jnp.float32}
    for backward in (False, True):
        mine = [point for point in points if len(point) == 3 + backward]
        got = cost(block_lists(mask, sizes, BATCH, heads, 0, segments), sizes, **arguments, backward=backward)
        assert len(mine) == len(set(mine)) == got.grid_points
