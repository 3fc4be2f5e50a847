"""Ours on a TPU beside JAX's splash attention at equal blocks: static counts, no times. Nothing runs; make .venv-tpu first.

From one compiler, for one TPU: the bundles of a grid step that computes, from the schedules, and their sum over all such steps
(ours has a branch for blocks that are seen in full, counted where all blocks are); the grid points, and those that compute,
from the lists of blocks; bytes between HBM and VMEM from the index maps, a block being moved where it is another than at the
grid point before; the entries of lists, which both keep in scalar memory.

Splash sums the gradient of the queries outside of its kernel, from an array with a part for each block of keys: its bytes have
that sum in them. Ours sums within, in float32. Ours tells the compiler to leave out bounds checks, splash does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from benchmarks.harness import run
from pallas_kernels.aot.counts import Entry, static_counts
from pallas_kernels.attention import block_mask, masks, sparse_attention
from pallas_kernels.attention.cost import Cost, cost

NEEDS_PEERS = False
TARGET = "v6e"
LENGTH, HEADS, HEAD_DIM, BLOCK, DTYPE = 8192, 8, 128, 512, jnp.bfloat16
LANES, SUBLANES, WORD = 128, 8, 4


class Pair(NamedTuple):
    """A mask of ours, and of splash."""

    ours: masks.Mask
    splash: Callable[[], Any]


SHAPE = (LENGTH, LENGTH)
MASKS = {
    "full": Pair(masks.full(), lambda: splash.FullMask(SHAPE)),
    "causal": Pair(masks.causal(), lambda: splash.CausalMask(SHAPE)),
    "window 1024": Pair(masks.window(1023, 0), lambda: splash.LocalMask(SHAPE, (1023, 0), 0)),
}


def _differentiated(attention: Callable[..., Any], shape: tuple[int, ...]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    def both(q, k, v, d_out):
        out, pull = jax.vjp(attention, q, k, v)
        return out, pull(d_out)

    return both, (jax.ShapeDtypeStruct(shape, DTYPE),) * 4


def ours(mask: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    blocks = block_mask(MASKS[mask].ours, LENGTH, LENGTH, BLOCK, BLOCK)
    attention = lambda q, k, v: sparse_attention(q, k, v, blocks, implementation="tpu")  # noqa: E731
    return _differentiated(attention, (1, LENGTH, HEADS, HEAD_DIM))


def peer(mask: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    def attention(q, k, v):
        sizes = splash.BlockSizes(
            block_q=BLOCK, block_kv=BLOCK, block_kv_compute=BLOCK, block_q_dkv=BLOCK, block_kv_dkv=BLOCK,
            block_kv_dkv_compute=BLOCK, use_fused_bwd_kernel=True,
        )  # fmt: skip
        every = splash.MultiHeadMask([MASKS[mask].splash()] * HEADS)
        kernel = splash.make_splash_mha(every, block_sizes=sizes, head_shards=1, q_seq_shards=1)
        return kernel(q * HEAD_DIM**-0.5, k, v)

    return _differentiated(attention, (HEADS, LENGTH, HEAD_DIM))


class Moved(NamedTuple):
    grid_points: int
    visited: int  # grid points that compute
    bytes: int
    entries: int


def of_ours(mask: str, backward: bool) -> Moved:
    blocks = block_mask(MASKS[mask].ours, LENGTH, LENGTH, BLOCK, BLOCK)
    found: Cost = cost(
        blocks, batch=1, q_heads=HEADS, kv_heads=HEADS, d_qk=HEAD_DIM, d_v=HEAD_DIM, dtype=DTYPE, backward=backward
    )
    return Moved(found.grid_points, found.visited, found.bytes_read + found.bytes_written, found.entries)


def of_peer(mask: str, backward: bool) -> Moved:
    """From splash's own lists. Forward its grid is (head, block of queries, step); backward (block of keys, head, step)."""
    every = splash.MultiHeadMask([MASKS[mask].splash()] * HEADS)
    lists = splash.splash_attention_mask_info
    if backward:
        info, _ = lists.process_mask_dkv(every, (BLOCK, BLOCK), head_shards=1, q_seq_shards=1, shrink_grid=False)
        positions = info.q_sequence is not None
        info = [np.asarray(x).transpose(2, 0, 1) for x in (info.data_next, info.block_mask)]  # [keys, heads or 1, queries]
        inner, kind = (np.broadcast_to(x, (x.shape[0], HEADS, x.shape[2])) for x in info)
        outer = np.arange(inner.shape[0])[:, None, None] * HEADS + np.arange(HEADS)[:, None] + np.zeros_like(inner)
        of = np.arange(HEADS)[:, None] + np.zeros_like(inner)
    else:
        info, _ = lists.process_mask(every, (BLOCK, BLOCK), head_shards=1, q_seq_shards=1)
        positions = info.q_sequence is not None
        shape = (HEADS, *info.data_next.shape[1:])
        inner, kind = (np.broadcast_to(np.asarray(x), shape) for x in (info.data_next, info.block_mask))
        of = np.arange(HEADS)[:, None, None] + np.zeros_like(inner)
        outer = np.arange(HEADS * inner.shape[1]).reshape(HEADS, -1, 1) + np.zeros_like(inner)
    unit, block = jnp.dtype(DTYPE).itemsize, BLOCK * HEAD_DIM
    ends, turns = _changes(outer), _changes(of, inner)
    if backward:  # by key: k, v, dk, dv; by query: q, do, lse and delta on all sublanes, and positions if masked; parts of dq
        moved = 4 * ends * unit * block + turns * (2 * unit * block + (2 + positions) * SUBLANES * BLOCK * WORD)
        moved += 2 * inner.size * unit * block + HEADS * LENGTH * HEAD_DIM * unit
    else:  # by query: q, out, lse, and positions if masked on all lanes; by key: k, v
        moved = ends * (2 * unit * block + (1 + positions) * LANES * BLOCK * WORD) + 2 * turns * unit * block
    entries = sum(np.asarray(x).size for x in info[:2]) if backward else 2 * np.asarray(info.data_next).size
    return Moved(inner.size, int((kind > 0).sum()), int(moved), int(entries))


def _changes(*index: np.ndarray) -> int:
    """How often any of these is another than at the grid point before, the first included."""
    flat = np.stack([x.reshape(-1) for x in index])
    return 1 + int((flat[:, 1:] != flat[:, :-1]).any(0).sum())


def main() -> list[dict[str, Any]]:
    entries = {f"ours, {mask}": Entry("benchmarks.attention_counts:ours", {"mask": mask}) for mask in MASKS}
    entries |= {f"splash, {mask}": Entry("benchmarks.attention_counts:peer", {"mask": mask}) for mask in MASKS}
    counted = static_counts(TARGET, entries)
    rows = []
    for mask in MASKS:
        for backward, words in enumerate(("forward", "backward")):

            def step(side: str, mask: str, backward: int = backward) -> int:
                counts = counted[f"{side}, {mask}"][backward].counts
                assert counts is not None, f"{side}, {mask}: the compiler shows no schedule"
                return counts.one_path  # of branches beside each other the longest

            full = block_mask(MASKS[mask].ours, LENGTH, LENGTH, BLOCK, BLOCK).counts()["full"] * HEADS
            own, theirs = of_ours(mask, bool(backward)), of_peer(mask, bool(backward))
            total = full * step("ours", "full") + (own.visited - full) * step("ours", mask)
            facts = {
                "ours": described(own, f"{step('ours', mask)}, full {step('ours', 'full')}", total),
                "splash": described(theirs, str(step("splash", mask)), theirs.visited * step("splash", mask)),
            }
            rows.append({"work": f"{mask}, {LENGTH}, {words}, {TARGET}", "facts": facts})
    return rows


def described(moved: Moved, each: str, total: int) -> dict[str, Any]:
    return {
        "bundles a step": each,
        "bundles of all steps": total,
        "steps": moved.visited,
        "grid points": moved.grid_points,
        "HBM bytes": moved.bytes,
        "entries of lists": moved.entries,
    }


if __name__ == "__main__":
    run(main)
