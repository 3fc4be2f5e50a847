"""What a pass over the lists costs, exactly: operations and bytes, from which blocks are visited and which are fetched.

A kernel goes through a grid of (sequence, head, entry of the list), in this order, and computes at the entries that are not
EMPTY. With q, kv the block sizes, and V such entries over all sequences and heads:

    forward     2 V q kv (d_qk + d_v) operations: scores, weight v
                V (q kv + q) exponentials: a weight a pair, a rescaling a query
    backward    2 V q kv (3 d_qk + 2 d_v): scores anew, dp = do v', dv = weight' do, dk = ds' q, dq = ds k
                V q kv exponentials

An operand's block is fetched at the first grid point and wherever it is not that of the grid point before; an output's block is
written back as often. So by query (forward) the blocks of queries come by once, and those of keys and values once for every
change of column, which EMPTY entries do not change; heads that read the same keys share a block where one's list ends with the
column that the next one's starts with. By key (backward, lists transposed) it is the other way round, and the gradient of the
queries, which is summed up in memory, is read and written at every change of the block.

Where all heads that read the same keys share a list, the backward grid has them innermost, (sequence, list, entry, head), and
sums their dk and dv before anything is written; dk, dv and dq are float32.

Not counted: the lists themselves (`entries` of them, an int32 each where they are packed), segment ids, sinks, and masks that
are looked up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.block_mask import BlockMask
from pallas_kernels.attention.lists import EMPTY, BlockLists, Sizes, transposed

FLOAT = 4  # bytes of log-sum-exps and of gradients that are summed up


class Cost(NamedTuple):
    """Of one pass. fetched, written: blocks, by the operand's and the output's name. visited: grid points that compute."""

    flops: int
    exps: int
    bytes_read: int
    bytes_written: int
    grid_points: int
    visited: int
    entries: int
    fetched: Mapping[str, int]
    written: Mapping[str, int]


def cost(
    blocks: BlockMask | BlockLists,
    sizes: Sizes | None = None,
    *,
    batch: int,
    q_heads: int,
    kv_heads: int,
    d_qk: int,
    d_v: int,
    dtype: Any,
    backward: bool = False,
) -> Cost:
    """Of the forward pass over these lists, or of the backward pass over them transposed.

    blocks: a BlockMask, or lists by query with their `sizes`, as the pass is given them: NumPy arrays, or (where data decide)
        JAX arrays, which keep their length when transposed. Not inside of jit, where there is no cost to tell yet.
    d_qk, d_v: as laid out in memory, with what pads them.
    """
    if isinstance(blocks, BlockMask):
        blocks, sizes = blocks.lists, blocks.sizes
    if sizes is None:
        raise ValueError("sizes: got None, wanted those of the lists")
    counts = {"batch": batch, "q_heads": q_heads, "kv_heads": kv_heads, "d_qk": d_qk, "d_v": d_v}
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"{name}: got {value!r}, wanted a whole number >= 1")
    if q_heads % kv_heads:
        raise ValueError(f"q_heads: got {q_heads}, wanted a multiple of kv_heads, {kv_heads}")
    for name, length, has in zip(("batch", "q_heads"), blocks.row.shape, (batch, q_heads)):
        if length not in (1, has) and not (name == "q_heads" and length == kv_heads):
            raise ValueError(f"{name}: got {has}, and there are lists for {length}")
    shape = (sizes, batch, q_heads, kv_heads, d_qk, d_v, jnp.dtype(dtype).itemsize)
    lists = BlockLists(*map(np.asarray, transposed(blocks, sizes.columns) if backward else blocks))
    return (_backward if backward else _forward)(lists, *shape)


def _forward(lists: BlockLists, sizes: Sizes, batch: int, heads: int, kv_heads: int, d_qk: int, d_v: int, unit: int) -> Cost:
    row, column, kind = _by_head(lists, batch, heads)
    visited, pairs = int((kind != EMPTY).sum()), sizes.q_block * sizes.kv_block
    group = np.arange(heads) // (heads // kv_heads)
    by_row, by_column = _changes(row, np.arange(heads)), _changes(column, group)
    fetched, written = {"q": by_row, "k": by_column, "v": by_column}, {"out": by_row, "lse": by_row}
    read = sizes.q_block * d_qk * by_row + sizes.kv_block * (d_qk + d_v) * by_column
    return Cost(
        flops=2 * visited * pairs * (d_qk + d_v),
        exps=visited * (pairs + sizes.q_block),
        bytes_read=unit * read,
        bytes_written=sizes.q_block * (unit * d_v + FLOAT) * by_row,
        grid_points=row.size,
        visited=visited,
        entries=lists.row.size,
        fetched=fetched,
        written=written,
    )


def _backward(lists: BlockLists, sizes: Sizes, batch: int, heads: int, kv_heads: int, d_qk: int, d_v: int, unit: int) -> Cost:
    """Of lists by key: `row` is the block of keys."""
    inner = heads // kv_heads if lists.row.shape[1] < heads else 1
    outer = heads // inner
    row, column, kind = _by_head(lists, batch, outer)
    visited, pairs = int((kind != EMPTY).sum()) * inner, sizes.q_block * sizes.kv_block
    by_key = _changes(row, np.arange(outer) // (outer // kv_heads))
    by_query = row.size * inner if inner > 1 else _changes(column, np.arange(outer))
    sums = visited if inner > 1 else _turns(column, kind)
    ends = _changes(row, np.arange(outer))
    fetched = {"q": by_query, "do": by_query, "lse": by_query, "delta": by_query, "k": by_key, "v": by_key, "dq": sums}
    read = unit * (d_qk + d_v) * (sizes.q_block * by_query + sizes.kv_block * by_key)
    return Cost(
        flops=2 * visited * pairs * (3 * d_qk + 2 * d_v),
        exps=visited * pairs,
        bytes_read=read + FLOAT * sizes.q_block * (2 * by_query + d_qk * sums),
        bytes_written=FLOAT * (sizes.kv_block * (d_qk + d_v) * ends + sizes.q_block * d_qk * sums),
        grid_points=row.size * inner,
        visited=visited,
        entries=lists.row.size,
        fetched=fetched,
        written={"dk": ends, "dv": ends, "dq": sums},
    )


def _by_head(lists: BlockLists, batch: int, heads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[batch, heads, n]; a list of a group of heads is that of each of them."""
    each = [np.repeat(x, heads // x.shape[1], axis=1) for x in lists]
    row, column, kind = (np.broadcast_to(x, (batch, *x.shape[1:])) for x in each)
    return row, column, kind


def _changes(index: np.ndarray, of: np.ndarray) -> int:
    """How often a block is another than at the grid point before, the first included. index: [batch, heads, n], the block along
    the sequence; of: [heads], whose it is."""
    within = (index[..., 1:] != index[..., :-1]).sum()
    between = (of[1:] != of[:-1]) | (index[:, 1:, 0] != index[:, :-1, -1])
    return int(within + between.sum() + index.shape[0])


def _turns(column: np.ndarray, kind: np.ndarray) -> int:
    """How often the block of queries changes from one entry that is not EMPTY to the next; every list starts anew."""
    turns = 0
    for blocks, kinds in zip(column.reshape(-1, column.shape[-1]), kind.reshape(-1, kind.shape[-1])):
        seen = blocks[kinds != EMPTY]
        turns += int((np.diff(seen) != 0).sum() + (len(seen) > 0))
    return turns
