"""Masks sorted into blocks: what is empty, what is full, and what the mask has to be asked about."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.algebra import Mask, shown
from pallas_kernels.attention.blocks import Blocks
from pallas_kernels.attention.lists import (
    EMPTY,
    FULL,
    PARTIAL,
    BlockLists,
    Segments,
    Sizes,
    all_blocks,
    bounded,
    compacted,
    kinds,
    rectangle,
    trimmed,
    within_segments,
)
from pallas_kernels.attention.patterns import FAR

LOOKED_AT = 1 << 22  # pairs at a time, where they have to be looked at one by one
MOST_PICTURED = 64  # rows and columns of a picture
CELLS = {EMPTY: "·", PARTIAL: "▒", FULL: "█"}


@dataclasses.dataclass(frozen=True, eq=True, repr=False)
class BlockMask:
    """A mask on `sizes` pairs, queries counted from q_offset, sorted into blocks. Equal and hashed by what it is made from.

    `block_mask` makes it; `sparse_attention` takes it in place of a mask, and then goes by its blocks. Printed, it is a
    picture.
    """

    mask: Mask
    sizes: Sizes
    heads: int  # 1 where all heads share a list
    batch: int
    q_offset: int

    @functools.cached_property
    def lists(self) -> BlockLists:
        """By query block: NumPy arrays [batch, heads, n], n as long as the longest list."""
        rows = [[self._list(b, h) for h in range(self.heads)] for b in range(self.batch)]
        n = max(len(one.row) for row in rows for one in row)
        padded = [[BlockLists(*(np.pad(x, (0, n - len(x)), mode="edge") for x in one)) for one in row] for row in rows]
        for row, given in zip(padded, rows):
            for one, had in zip(row, given):
                one.kind[len(had.kind) :] = EMPTY
        return BlockLists(*(np.array([[getattr(one, name) for one in row] for row in padded]) for name in BlockLists._fields))

    def _list(self, b: int, h: int) -> BlockLists:
        sizes = self.sizes
        row, column = np.arange(sizes.rows)[:, None], np.arange(sizes.columns)[None]
        some, every = self.mask.bounds(b, h, *rectangle(row, column, sizes, self.q_offset))
        kind = np.broadcast_to(kinds(some, every, column, sizes), (sizes.rows, sizes.columns)).copy()
        row, column = np.nonzero(kind)
        if not self.mask.exact:
            # a ragged last column may be seen entirely, and is PARTIAL all the same
            self._look(b, h, *np.nonzero(kind == PARTIAL), kind)
            row, column = np.nonzero(kind)
        return BlockLists(*(x[0, 0] for x in trimmed(_nested(compacted(row, column, kind[row, column], sizes.rows)))))

    def _look(self, b: int, h: int, rows: np.ndarray, columns: np.ndarray, kind: np.ndarray) -> None:
        """Asks the mask for every pair of these blocks and sets their kinds."""
        sizes = self.sizes
        at_once = max(1, LOOKED_AT // (sizes.q_block * sizes.kv_block))
        q_inside, kv_inside = np.arange(sizes.q_block)[None, :, None], np.arange(sizes.kv_block)[None, None, :]
        for start in range(0, len(rows), at_once):
            row, column = (x[start : start + at_once, None, None] for x in (rows, columns))
            q_index, kv_index = row * sizes.q_block + q_inside, column * sizes.kv_block + kv_inside
            with _now():
                seen = np.asarray(self.mask(b, h, q_index + self.q_offset, kv_index))
            seen = np.broadcast_to(seen, np.broadcast_shapes(q_index.shape, kv_index.shape))
            inside = (q_index < sizes.q_len) & (kv_index < sizes.kv_len)
            some, every = (seen & inside).any((1, 2)), (seen | ~inside).all((1, 2))
            kind[row[:, 0, 0], column[:, 0, 0]] = kinds(some, every, column[:, 0, 0], sizes)

    def counts(self) -> dict[str, int]:
        """How many blocks there are, over all lists: partial, full, and all (empty ones with them)."""
        kind = self.lists.kind
        every = self.batch * self.heads * self.sizes.rows * self.sizes.columns
        return {"partial": int((kind == PARTIAL).sum()), "full": int((kind == FULL).sum()), "all": every}

    @property
    def density(self) -> float:
        """The share of blocks that are not empty."""
        counts = self.counts()
        return (counts["partial"] + counts["full"]) / counts["all"]

    def table(self, b: int = 0, h: int = 0) -> np.ndarray:
        """int32 [rows, columns]: EMPTY, PARTIAL or FULL."""
        table = np.zeros((self.sizes.rows, self.sizes.columns), np.int32)
        row, column, kind = (x[b, h] for x in self.lists)
        np.maximum.at(table, (row, column), kind)
        return table

    @functools.cached_property
    def patterns(self) -> tuple[np.ndarray, np.ndarray]:
        """What the partial blocks look like inside, each pattern once: (bool [patterns, q_block, kv_block], int32 [batch,
        heads, n] which of them an entry of `lists` has; 0 where it has none). Keys beyond the last are not seen."""
        row, column, kind = self.lists
        found: dict[bytes, int] = {}
        patterns: list[np.ndarray] = []
        which = np.zeros(kind.shape, np.int32)
        for b, h, i in zip(*np.nonzero(kind == PARTIAL)):
            seen = self.pairs(int(row[b, h, i]), int(column[b, h, i]), int(b), int(h))
            key = np.packbits(seen).tobytes()
            if key not in found:
                found[key] = len(patterns)
                patterns.append(seen)
            which[b, h, i] = found[key]
        empty = np.zeros((1, self.sizes.q_block, self.sizes.kv_block), bool)
        return np.stack(patterns) if patterns else empty, which

    def pairs(self, row: int, column: int, b: int = 0, h: int = 0) -> np.ndarray:
        """bool [q_block, kv_block]: the mask within one block."""
        sizes = self.sizes
        q_index = row * sizes.q_block + np.arange(sizes.q_block)[:, None]
        kv_index = column * sizes.kv_block + np.arange(sizes.kv_block)[None]
        with _now():
            seen = np.asarray(self.mask(b, h, q_index + self.q_offset, kv_index))
        return np.broadcast_to(seen & (kv_index < sizes.kv_len), (sizes.q_block, sizes.kv_block))

    def __repr__(self) -> str:
        sizes, counts = self.sizes, self.counts()
        lists = f", {self.batch} x {self.heads} lists" if self.batch * self.heads > 1 else ""
        seen = counts["partial"] + counts["full"]
        return (
            f"BlockMask({self.mask!r}, {sizes.q_len} x {sizes.kv_len} in blocks of {sizes.q_block} x {sizes.kv_block}{lists}: "
            f"{seen} of {counts['all']} not empty, {self.density:.1%}; {counts['full']} full)"
        )

    def __str__(self) -> str:
        pictures = []
        for b in range(self.batch):
            for h in range(self.heads):
                title = f"sequence {b}, head {h}:\n" if self.batch * self.heads > 1 else ""
                pictures.append(title + "\n".join(_pictured(self.table(b, h))))
        return "\n\n".join([repr(self), *pictures])


@contextlib.contextmanager
def _now() -> Iterator[None]:
    """Computes while a program is traced, also within `jax.shard_map`, whose mesh is not for arrays that exist."""
    with jax.ensure_compile_time_eval(), jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        yield


def _nested(lists: BlockLists) -> BlockLists:
    return BlockLists(*(x[None, None] for x in lists))


def _pictured(table: np.ndarray) -> Iterator[str]:
    """Lines of a picture; where there are too many blocks, a cell stands for several: full (empty) if all of them are."""
    rows, columns = (np.unique(np.linspace(0, n, min(n, MOST_PICTURED) + 1).round().astype(int)) for n in table.shape)
    for top, bottom in zip(rows[:-1], rows[1:]):
        cells = [table[top:bottom, left:right] for left, right in zip(columns[:-1], columns[1:])]
        yield "".join(CELLS[FULL if (c == FULL).all() else PARTIAL if c.any() else EMPTY] for c in cells)


def block_mask(mask: Mask, q_len: int, kv_len: int, q_block: int = 128, kv_block: int = 128, *, q_offset: int = 0,
               heads: int = 0, batch: int = 0) -> BlockMask:  # fmt: skip
    """The mask on q_len x kv_len pairs, in blocks of q_block x kv_block. heads, batch: how many there are; needed where the
    mask tells any number of them apart. Equal arguments give the same value. Time and memory grow with the number of blocks,
    and with the pairs in those that the mask's bounds leave open.

    Raises ValueError for what is no mask, sizes that are no whole numbers (a traced one is none), and positions that the mask
    does not tell about."""
    if not isinstance(mask, Mask):
        raise ValueError(f"block_mask's mask: got {type(mask).__name__}, wanted a mask such as masks.causal()")
    least = {"q_len": 1, "kv_len": 1, "q_block": 1, "kv_block": 1, "heads": 0, "batch": 0}
    given = {"q_len": q_len, "kv_len": kv_len, "q_block": q_block, "kv_block": kv_block, "heads": heads, "batch": batch}
    for name, value in given.items():
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least[name]:
            raise ValueError(f"block_mask's {name}: got {shown(value)}, wanted a whole number >= {least[name]}")
    if not isinstance(q_offset, (int, np.integer)) or isinstance(q_offset, bool):
        raise ValueError(f"block_mask's q_offset: got {shown(q_offset)}, wanted a whole number")
    return _block_mask(mask, *(int(n) for n in (q_len, kv_len, q_block, kv_block, q_offset, heads, batch)))


@functools.lru_cache(maxsize=256)
def _block_mask(mask: Mask, q_len: int, kv_len: int, q_block: int, kv_block: int, q_offset: int, heads: int,
                batch: int) -> BlockMask:  # fmt: skip
    check_offset(q_offset, q_len)
    check_length(mask, q_len, kv_len, q_offset)
    counts = [_needed(*each) for each in (("heads", mask.heads, heads), ("batch", mask.batch, batch))]
    return BlockMask(mask, Sizes(q_len, kv_len, q_block, kv_block), *counts, q_offset)


def check_offset(q_offset: int, q_len: int) -> None:
    """Raises ValueError for positions of queries so far out that sums with them would not fit int32."""
    if not -FAR <= q_offset <= FAR - q_len:
        raise ValueError(f"q_offset: got {shown(q_offset)}, wanted a whole number from {-FAR} to {FAR - q_len}")


def check_length(mask: Mask, q_len: int, kv_len: int, q_offset: Any) -> None:
    """Raises ValueError for positions beyond those that the mask tells about. An offset that is data is not looked at."""
    if mask.length is not None and isinstance(q_offset, (int, np.integer)) and q_offset < 0:
        raise ValueError(f"q_offset: got {q_offset}, wanted at least 0 for a mask of {mask.length} positions, which begin at 0")
    last = max(kv_len, q_len + q_offset) if isinstance(q_offset, (int, np.integer)) else kv_len
    if mask.length is not None and last > mask.length:
        whose = "those of the keys and of queries from q_offset"
        raise ValueError(f"mask: got one of {mask.length} positions, wanted {last}, {whose}")


def _needed(name: str, told_apart: int, given: int) -> int:
    """How many lists: one where the mask is the same for all."""
    if told_apart == 0:
        return 1
    if told_apart > 0:
        if given and given != told_apart:
            raise ValueError(f"mask: it is one of {told_apart} {name}, and there are {given}")
        return told_apart
    if not given:
        raise ValueError(f"block_mask's {name}: got 0, wanted how many there are, since the mask looks at them")
    return given


def narrowed(values: Any, low: int, high: int) -> jax.Array:
    """Integers of any width as int32, those outside of low .. high as the nearer end."""
    xp = np if isinstance(values, np.ndarray) else jnp
    held = xp.iinfo(values.dtype)
    return jnp.asarray(xp.clip(values, max(low, held.min), min(high, held.max)).astype(xp.int32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SelectedBlocks:
    """Sparsity as data: for every block of queries the blocks of keys it may see, such as the best few by some score.

    index: integers [batch or 1, heads, rows, count], heads being 1, that of the keys, or that of the queries. rows: blocks of
        q_block in the queries. -1 selects nothing, and so does any other number that no block of keys has: rows that select
        fewer than others are filled up so. A block selected twice counts once. It may be traced; no gradient reaches it.
    mask: what is seen within the selected blocks, besides.

    Its index being data, which may not be known, it is equal to itself alone. `sparse_attention` raises ValueError for what
    does not fit its arrays.
    """

    index: Any
    q_block: int = dataclasses.field(metadata={"static": True})
    kv_block: int = dataclasses.field(metadata={"static": True})
    mask: Mask = dataclasses.field(metadata={"static": True})

    def checked(self, batch: int, q_heads: int, kv_heads: int, sizes: Sizes) -> SelectedBlocks:
        """The same with an index that is int32. Raises ValueError where it does not fit the arrays."""
        if not isinstance(self.mask, Mask):
            raise ValueError(f"mask.mask: got {type(self.mask).__name__}, wanted a mask such as masks.causal()")
        for name, block in (("q_block", self.q_block), ("kv_block", self.kv_block)):
            if not isinstance(block, (int, np.integer)) or isinstance(block, bool) or block < 1:
                raise ValueError(f"mask.{name}: got {shown(block)}, wanted a whole number >= 1")
        if not isinstance(self.index, (jax.Array, np.ndarray)):
            raise ValueError(f"mask.index: got {type(self.index).__name__}, wanted an array of integers")
        shape, dtype = jnp.shape(self.index), jnp.result_type(self.index)
        good = len(shape) == 4 and shape[0] in (1, batch) and shape[1] in (1, kv_heads, q_heads) and shape[2] == sizes.rows
        if not good or not jnp.issubdtype(dtype, jnp.integer):
            heads = ", ".join(map(str, sorted({1, kv_heads, q_heads})))
            raise ValueError(
                f"mask.index: got {dtype}{list(shape)}, wanted integers [1 or {batch}, heads: {heads}, {sizes.rows}, count]"
            )
        return dataclasses.replace(self, index=narrowed(self.index, -1, sizes.columns))

    def __repr__(self) -> str:
        return f"SelectedBlocks({shown(self.index)}, {self.q_block} x {self.kv_block}, {self.mask!r})"

    def lists(self, batch: int, q_heads: int, sizes: Sizes, q_offset: Any) -> BlockLists:
        """[batch or 1, 1 or q_heads, rows * (count + 1)]."""
        index = jnp.sort(jnp.asarray(self.index, jnp.int32), axis=-1)
        heads = index.shape[1] if index.shape[1] == 1 else q_heads
        index = jnp.repeat(index, heads // index.shape[1], axis=1)
        again = jnp.concatenate([jnp.zeros_like(index[..., :1], bool), index[..., 1:] == index[..., :-1]], axis=-1)
        gone = again | (index < 0) | (index >= sizes.columns)
        row = jnp.broadcast_to(jnp.arange(sizes.rows, dtype=jnp.int32)[:, None], index.shape)
        row, column, gone = (x.reshape(*index.shape[:2], -1) for x in (row, index, gone))
        column = jnp.clip(column, 0, sizes.columns - 1)
        kind = bounded(self.mask, row, column, sizes, q_heads, batch, q_offset)
        return compacted(row, column, jnp.where(gone, EMPTY, kind), sizes.rows)


def inner(mask: Mask | BlockMask | SelectedBlocks) -> Mask:
    """What is asked about single pairs."""
    return mask if isinstance(mask, Mask) else mask.mask


def own_blocks(mask: Mask | BlockMask | SelectedBlocks) -> Blocks | None:
    """The block sizes that the mask brings; None where the implementation chooses them."""
    if isinstance(mask, Mask):
        return None
    sizes = mask.sizes if isinstance(mask, BlockMask) else mask
    return Blocks(sizes.q_block, sizes.kv_block)


def as_block_mask(
    mask: Mask | BlockMask | SelectedBlocks, sizes: Sizes, q_offset: int, heads: int = 0, batch: int = 0
) -> BlockMask:
    """The mask itself where it has blocks that are known, else that of `sizes`, without regard to what is selected."""
    return mask if isinstance(mask, BlockMask) else block_mask(inner(mask), *sizes, q_offset=q_offset, heads=heads, batch=batch)


def block_lists(mask: Mask | BlockMask | SelectedBlocks, sizes: Sizes, batch: int, q_heads: int, q_offset: Any,
                segments: Segments | None) -> BlockLists:  # fmt: skip
    """The lists of a call, by query block. `transposed` gives those by key block.

    sizes: of the blocks that the implementation chose; a BlockMask and SelectedBlocks bring their own, equal to these.
    q_offset: an int, or int32 [] or [batch], which may be traced.
    """
    if isinstance(mask, SelectedBlocks):
        lists = mask.lists(batch, q_heads, sizes, q_offset)
    elif isinstance(q_offset, int):
        lists = as_block_mask(mask, sizes, q_offset, q_heads, batch).lists
    else:
        lists = all_blocks(inner(mask), sizes, q_heads, batch, q_offset)
    return lists if segments is None else within_segments(lists, segments, sizes)
