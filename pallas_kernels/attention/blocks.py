"""Block sizes: one table by implementation and device; within a row the first entry that the shape fits."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from pallas_kernels.attention.algebra import Mask
from pallas_kernels.attention.lists import Sizes, rectangle


class Blocks(NamedTuple):
    """Queries and keys a block."""

    q: int
    kv: int


class Entry(NamedTuple):
    """For q_len >= `q_len` and head dimensions <= `head_dim`: blocks of the forward and the backward pass."""

    q_len: int
    head_dim: int
    forward: Blocks
    backward: Blocks


TABLE: dict[tuple[str, str], tuple[Entry, ...]] = {  # (implementation, device kind; "*" for all others)
    ("tpu", "*"): (
        Entry(1, 128, forward=Blocks(512, 512), backward=Blocks(512, 512)),
        Entry(1, 256, forward=Blocks(512, 512), backward=Blocks(256, 512)),
        Entry(1, 512, forward=Blocks(256, 512), backward=Blocks(256, 256)),
    ),
    ("gpu", "*"): (  # through Triton, which cuts them further
        Entry(17, 256, forward=Blocks(128, 64), backward=Blocks(64, 64)),
        Entry(1, 256, forward=Blocks(16, 64), backward=Blocks(16, 64)),
    ),
    ("gpu", "hopper"): (Entry(1, 128, forward=Blocks(128, 128), backward=Blocks(64, 64)),),  # through Mosaic GPU
}


def block_sizes(implementation: str, device: str, q_len: int, head_dim: int) -> tuple[Blocks, Blocks]:
    """Of the forward and the backward pass. head_dim: the larger of those of keys and values. Raises NotImplementedError for a
    head_dim above the table's."""
    entries = TABLE.get((implementation, device)) or TABLE[implementation, "*"]
    for entry in entries:
        if q_len >= entry.q_len and head_dim <= entry.head_dim:
            return entry.forward, entry.backward
    most = max(entry.head_dim for entry in entries)
    raise NotImplementedError(f"q: {implementation} has head dimensions up to {most}, got {head_dim}")


XLA_SIZES = (64, 128, 256, 512)  # what "xla" chooses from where the mask decides alone
XLA_SIZE = 128  # and where data do, or nothing is known of the mask before its pairs are looked at
# Measured on CPU with 4 heads x 64, in units of a key that a query is compared with: what a row of blocks costs besides.
XLA_COPIED, XLA_ROW = 30, 3300


@functools.lru_cache(maxsize=256)
def xla_block_sizes(mask: Mask, q_len: int, kv_len: int, q_offset: int | None) -> Sizes:
    """Of both passes of "xla": the cheapest for the mask. q_offset: None if it is data."""
    if q_offset is None or mask.heads or mask.batch or q_len < XLA_SIZES[0] or _blind(mask, q_len, kv_len, q_offset):
        return _fitted(q_len, kv_len, XLA_SIZE)
    return min((_fitted(q_len, kv_len, size) for size in reversed(XLA_SIZES)), key=lambda sizes: _cost(mask, sizes, q_offset))


def _fitted(q_len: int, kv_len: int, size: int) -> Sizes:
    """Blocks of about `size`, such that the last one is nearly full: multiples of 8, or the whole length."""

    def of(length: int) -> int:
        return length if length <= size else -(-length // -(-length // size) // 8) * 8

    return Sizes(q_len, kv_len, of(q_len), of(kv_len))


def _some(mask: Mask, sizes: Sizes, q_offset: int) -> int:
    """How many blocks the mask's bounds leave."""
    row, column = np.arange(sizes.rows)[:, None], np.arange(sizes.columns)[None]
    some, _ = mask.bounds(0, 0, *rectangle(row, column, sizes, q_offset))
    return int(np.broadcast_to(some, (sizes.rows, sizes.columns)).sum())


def _blind(mask: Mask, q_len: int, kv_len: int, q_offset: int) -> bool:
    """Whether the bounds leave all blocks, which may be since nothing is known."""
    sizes = _fitted(q_len, kv_len, XLA_SIZES[0])
    return not mask.exact and _some(mask, sizes, q_offset) == sizes.rows * sizes.columns


def _cost(mask: Mask, sizes: Sizes, q_offset: int) -> float:
    """A query's, on average."""
    keys = _some(mask, sizes, q_offset) / sizes.rows * sizes.kv_block
    return keys * (1 + XLA_COPIED / sizes.q_block) + XLA_ROW / sizes.q_block
