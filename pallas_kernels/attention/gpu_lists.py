"""Block lists as a GPU's programs read them: each program finds the blocks of its row (or column) by two numbers.

On a TPU one grid goes through a whole list in order. On a GPU programs run at once, so each takes one row of blocks of
queries (or column of blocks of keys) and goes through that row's entries alone: the compressed rows of a sparse matrix.
Within a row FULL blocks stand before PARTIAL ones, so that there are two plain loops and no branch inside of either.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.algebra import Mask
from pallas_kernels.attention.block_mask import BlockMask, SelectedBlocks, as_block_mask, block_lists, inner
from pallas_kernels.attention.lists import EMPTY, FULL, PARTIAL, BlockLists, Segments, Sizes

MOST_PAIRS = 1 << 30  # in the partial blocks of a mask that has to be spelt out: each is asked for once, here
MOST_BYTES = 1 << 28  # of the bitmaps that differ


class Visits(NamedTuple):
    """int32 arrays. B is 1 where all sequences share the lists, H where all heads do.

    ends: [B, H, 2 * rows + 1]; row r has its FULL blocks at entries ends[2r] to ends[2r + 1], its PARTIAL ones from there to
        ends[2r + 2]. EMPTY entries are in no row.
    other: [B, H, n]; the column of an entry (its row, where the lists are by column).
    pattern: [B, H, n]; which bitmap a PARTIAL entry has; None where the mask is asked instead.
    """

    ends: Any
    other: Any
    pattern: Any


class Blocked(NamedTuple):
    """A mask as kernels take it."""

    lists: BlockLists
    which: Any  # int32 [B, H, n]: the pattern of an entry; None where `mask` is asked
    patterns: Any  # int32 [patterns, q_block, kv_block]: 1 where the query sees the key; or None. As wide as the scores are:
    # Triton spills registers when it has to spread bytes out to where scores lie
    mask: Mask | None  # what PARTIAL blocks have to ask, where no array is needed to answer


def blocked(mask: Mask | BlockMask | SelectedBlocks, sizes: Sizes, batch: int, q_heads: int, q_offset: Any,
            segments: Segments | None) -> Blocked:  # fmt: skip
    """Lists of a call, and what its partial blocks look like: by index arithmetic, or as bitmaps."""
    asked = inner(mask)
    if asked.analytic:
        return Blocked(block_lists(mask, sizes, batch, q_heads, q_offset, segments), None, None, asked)
    if not isinstance(q_offset, int):
        raise NotImplementedError("q_offset: traced, beside a mask that looks at arrays")
    static = as_block_mask(mask, sizes, q_offset, q_heads, batch)
    patterns, which = _bitmaps(static)
    if isinstance(mask, SelectedBlocks) or segments is not None:
        lists = block_lists(mask, sizes, batch, q_heads, q_offset, segments)
        return Blocked(lists, _looked_up(static, which, len(patterns), lists), patterns, None)
    return Blocked(static.lists, which, patterns, None)


@functools.lru_cache(maxsize=64)
def _bitmaps(mask: BlockMask) -> tuple[np.ndarray, np.ndarray]:
    """The mask's patterns, and two more: all seen (last but one; of FULL entries) and none seen (the last)."""
    pairs = mask.counts()["partial"] * mask.sizes.q_block * mask.sizes.kv_block
    if pairs > MOST_PAIRS:
        raise NotImplementedError(f"mask: it looks at arrays, and its partial blocks have {pairs} pairs, above {MOST_PAIRS}")
    patterns, which = mask.patterns
    ends = np.stack([np.ones(patterns.shape[1:], bool), np.zeros(patterns.shape[1:], bool)])
    which = np.where(mask.lists.kind == FULL, len(patterns), which)
    patterns = np.concatenate([patterns, ends])
    if 4 * patterns.size > MOST_BYTES:
        raise NotImplementedError(
            f"mask: it looks at arrays, and its bitmaps have {4 * patterns.size} bytes, above {MOST_BYTES}"
        )
    return patterns.astype(np.int32), which.astype(np.int32)


def _looked_up(mask: BlockMask, which: np.ndarray, patterns: int, lists: BlockLists) -> jax.Array:
    """int32 [B, H, n]: the patterns of the entries of lists that are data, found among the mask's own."""
    columns = mask.sizes.columns
    own = np.where(mask.lists.kind == EMPTY, np.iinfo(np.int32).max, mask.lists.row * columns + mask.lists.column)
    order = np.argsort(own, axis=-1, kind="stable")
    own, which = np.take_along_axis(own, order, -1), np.take_along_axis(which, order, -1)
    wanted = jnp.asarray(lists.row) * columns + jnp.asarray(lists.column)
    shape = (*np.broadcast_shapes(own.shape[:2], wanted.shape[:2]), -1)
    own, which, wanted = (jnp.broadcast_to(x, (*shape[:2], x.shape[-1])) for x in (own, which, wanted))
    at = jax.vmap(jax.vmap(jnp.searchsorted))(own, wanted)
    at = jnp.minimum(at, own.shape[-1] - 1)
    found = jnp.take_along_axis(own, at, -1) == wanted
    return jnp.where(found, jnp.take_along_axis(which, at, -1), patterns - 1)


def visits(lists: BlockLists, which: Any, by: Literal["row", "column"], count: int) -> Visits:
    """The lists by each of `count` rows or columns. NumPy arrays where the lists are."""
    xp = jnp if any(isinstance(x, jax.Array) for x in (*lists, which)) else np
    major, minor = (lists.row, lists.column) if by == "row" else (lists.column, lists.row)
    kind = lists.kind
    place = xp.where(kind == EMPTY, 2 * count, 2 * major + (kind == PARTIAL))  # FULL before PARTIAL, EMPTY behind all rows
    if which is None:
        place, minor = xp.broadcast_arrays(place, minor)
    else:
        place, minor, which = xp.broadcast_arrays(place, minor, which)
    order = xp.lexsort((minor, place), axis=-1)
    if which is not None:
        which = xp.take_along_axis(which, order, -1).astype(np.int32)
    place, minor = (xp.take_along_axis(x, order, -1) for x in (place, minor))
    wanted = np.arange(2 * count + 1)
    if xp is np:
        ends = np.array([[np.searchsorted(one, wanted) for one in sequence] for sequence in place])
    else:
        ends = jax.vmap(jax.vmap(lambda one: jnp.searchsorted(one, wanted)))(place)
    return Visits(ends.astype(np.int32), minor.astype(np.int32), which)
