"""Block sizes: one table by implementation and device; within a row the first entry that the shape fits."""

from __future__ import annotations

from typing import NamedTuple


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
    # Through Triton, which cuts them further; head_dim is counted in elements of 2 bytes.
    ("gpu", "*"): (
        Entry(17, 512, forward=Blocks(128, 64), backward=Blocks(64, 64)),
        Entry(1, 512, forward=Blocks(16, 64), backward=Blocks(16, 64)),
    ),
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
