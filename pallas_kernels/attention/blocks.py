"""Block sizes: one table by implementation and device; within a row the first entry that the shape fits."""

from __future__ import annotations

from typing import Any, NamedTuple

from pallas_kernels.attention.lists import Sizes


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
    # Through Triton, which cuts them further; head_dim is counted in elements of 2 bytes.
    ("gpu", "*"): (
        Entry(17, 512, forward=Blocks(128, 64), backward=Blocks(64, 64)),
        Entry(1, 512, forward=Blocks(16, 64), backward=Blocks(16, 64)),
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


def xla_block_sizes(mask: Any, q_len: int, kv_len: int, q_offset: int | None) -> tuple[Sizes, Sizes]:
    """Of the forward and the backward pass of "xla"."""

    def fitted(length: int, size: int) -> int:
        """About `size`, such that the last block is nearly full; a multiple of 8."""
        return -(-length // -(-length // size) // 8) * 8

    sizes = Sizes(q_len, kv_len, fitted(q_len, 128), fitted(kv_len, 128))
    return sizes, sizes
