"""Lists of the blocks of pairs that are not empty: what every implementation but the reference goes through.

A list has an entry (row, column, kind) for each block of `q_block` x `kv_block` pairs in which a query sees a key, sorted by
row, then column. Lists are NumPy arrays where the mask alone decides, and arrays of the step where data do: a traced offset,
segments, selected blocks. The second kind keeps the size of the first; entries that fell away are EMPTY.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.algebra import Mask

EMPTY, PARTIAL, FULL = 0, 1, 2  # no pair is seen; some are, so that the mask has to be asked; all are


class BlockLists(NamedTuple):
    """int32 arrays [B, H, n]; B is 1 where all sequences share a list, H where all heads do.

    row: of the block, not decreasing. Every row occurs: one without any pair has a single EMPTY entry, so that who goes through
    the list comes by every row and can write what an empty row gives. column: of the block; of an EMPTY entry, that of the
    entry before, so that nothing is fetched for it. kind: EMPTY, PARTIAL or FULL.
    """

    row: Any
    column: Any
    kind: Any


class Sizes(NamedTuple):
    """How q_len x kv_len pairs are cut into blocks. The last block of either axis may reach beyond its end."""

    q_len: int
    kv_len: int
    q_block: int
    kv_block: int

    @property
    def rows(self) -> int:
        return -(-self.q_len // self.q_block)

    @property
    def columns(self) -> int:
        return -(-self.kv_len // self.kv_block)


class Segments(NamedTuple):
    """int32 ids [batch, q_len] and [batch, kv_len]; a query sees the keys of its own segment."""

    q: Any
    kv: Any


def _numpy(*arrays: Any) -> bool:
    return not any(isinstance(a, jax.Array) for a in arrays)


def kinds(some: Any, every: Any, column: Any, sizes: Sizes) -> Any:
    """int32 kinds from a mask's bounds. A block that reaches beyond the last key is never FULL: the mask has to cut it off."""
    every = every & (column < sizes.kv_len // sizes.kv_block)
    return (some * (1 + (some & every))).astype(np.int32)


def rectangle(row: Any, column: Any, sizes: Sizes, q_offset: Any) -> tuple[Any, Any, Any, Any]:
    """First and last query (counted from `q_offset` on) and key of blocks."""
    xp = np if _numpy(row, column, q_offset) else jnp
    q_first, kv_first = row * sizes.q_block, column * sizes.kv_block
    q_last = xp.minimum(q_first + sizes.q_block, sizes.q_len) - 1
    return q_first + q_offset, q_last + q_offset, kv_first, xp.minimum(kv_first + sizes.kv_block, sizes.kv_len) - 1


def compacted(row: Any, column: Any, kind: Any, rows: int) -> BlockLists:
    """Sorted lists that come by each of `rows` rows, from entries in any order; n grows by `rows`.

    An EMPTY entry is added to every row. In a row, EMPTY entries come last.
    """
    xp = np if _numpy(row, column, kind) else jnp
    row, column, kind = xp.broadcast_arrays(row, column, kind)
    more = xp.broadcast_to(xp.arange(rows, dtype=np.int32), (*row.shape[:-1], rows))
    row = xp.concatenate([row, more], axis=-1)
    column, kind = (xp.concatenate([x, xp.zeros_like(more)], axis=-1) for x in (column, kind))
    most = int(np.iinfo(np.int32).max)
    columns = xp.where(kind == EMPTY, most, column)
    order = xp.lexsort((columns, row), axis=-1)
    row, column, kind = (xp.take_along_axis(x, order, axis=-1) for x in (row, column, kind))
    return BlockLists(row.astype(np.int32), _filled(column, kind, xp).astype(np.int32), kind.astype(np.int32))


def _filled(column: Any, kind: Any, xp: Any) -> Any:
    """Columns of EMPTY entries become that of the last other entry before them."""
    places = xp.where(kind == EMPTY, 0, xp.arange(kind.shape[-1]))
    last = np.maximum.accumulate(places, axis=-1) if xp is np else jax.lax.cummax(places, axis=places.ndim - 1)
    return xp.take_along_axis(column, last, axis=-1)


def transposed(lists: BlockLists, columns: int) -> BlockLists:
    """The same blocks by column: `row` is the key block then, and `column` the query block."""
    return trimmed(compacted(lists.column, lists.row, lists.kind, columns))


def trimmed(lists: BlockLists) -> BlockLists:
    """Without the EMPTY entries that nobody needs, where the lists are known: as long as the longest of them, the others padded
    at their end."""
    if not _numpy(*lists):
        return lists
    first = np.diff(lists.row, axis=-1, prepend=-1) != 0
    kept = (lists.kind != EMPTY) | first
    n = int(kept.sum(-1).max())
    order = np.argsort(~kept, axis=-1, kind="stable")[..., :n]
    row, column, kind = (np.take_along_axis(x, order, -1) for x in lists)
    spare = np.arange(n) >= kept.sum(-1, keepdims=True)
    row = np.where(spare, row.max(-1, keepdims=True, initial=0, where=~spare), row)
    kind = np.where(spare, EMPTY, kind)
    return BlockLists(row.astype(np.int32), _filled(column, kind, np).astype(np.int32), kind.astype(np.int32))


def within_segments(lists: BlockLists, segments: Segments, sizes: Sizes) -> BlockLists:
    """Lists [batch, H, n] without the blocks in which no query and key can be of one segment: those whose ranges of ids do not
    overlap. FULL stays only where both blocks are of one segment."""

    def ranges(ids: Any, block: int, count: int) -> tuple[Any, Any]:
        short = count * block - ids.shape[1]
        ids = jnp.pad(jnp.asarray(ids), [(0, 0), (0, short)], mode="edge").reshape(ids.shape[0], count, block)
        return ids.min(-1), ids.max(-1)

    def of(values: Any, index: Any) -> Any:  # [batch, count], [B, H, n] -> [batch, H, n]
        index = jnp.broadcast_to(jnp.asarray(index), (values.shape[0], *index.shape[1:]))
        return jnp.take_along_axis(values[:, None], index, axis=-1)

    q_least, q_most = (of(x, lists.row) for x in ranges(segments.q, sizes.q_block, sizes.rows))
    kv_least, kv_most = (of(x, lists.column) for x in ranges(segments.kv, sizes.kv_block, sizes.columns))
    overlap = (q_least <= kv_most) & (kv_least <= q_most)
    one = (q_least == kv_most) & (kv_least == q_most)
    kind = jnp.where(overlap, jnp.where(one, lists.kind, jnp.minimum(lists.kind, PARTIAL)), EMPTY)
    return compacted(lists.row, lists.column, kind, sizes.rows)


def all_blocks(mask: Mask, sizes: Sizes, heads: int, batch: int, q_offset: Any) -> BlockLists:
    """Lists of every block, kinds by the mask's bounds, for an offset that is data: int32 [] or [batch]. What the bounds leave
    open is PARTIAL."""
    row, column = (jnp.asarray(x.reshape(1, 1, -1), jnp.int32) for x in np.indices((sizes.rows, sizes.columns)))
    return compacted(row, column, bounded(mask, row, column, sizes, heads, batch, q_offset), sizes.rows)


def bounded(mask: Mask, row: Any, column: Any, sizes: Sizes, heads: int, batch: int, q_offset: Any) -> Any:
    """Kinds by the mask's bounds of blocks [B, H, n], at offsets [] or [batch]: int32 [B, H, n], where B and H are 1 only if
    nothing tells sequences (heads) apart."""
    offset = jnp.asarray(q_offset).reshape(-1, 1, 1)

    def of(b: int | None, h: int | None) -> Any:  # None: all of them at once
        mine = [x if b is None or len(x) == 1 else x[b : b + 1] for x in (row, column, offset)]
        mine = [x if h is None or x.shape[1] == 1 else x[:, h : h + 1] for x in mine]
        some, every = mask.bounds(b or 0, h or 0, *rectangle(mine[0], mine[1], sizes, mine[2]))
        return kinds(some, every, mine[1], sizes)

    each = [[of(b, h) for h in (range(heads) if mask.heads else [None])] for b in (range(batch) if mask.batch else [None])]
    return jnp.concatenate([jnp.concatenate(parts, axis=1) for parts in each], axis=0)
