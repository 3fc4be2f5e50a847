"""Backward pass of the TPU kernel: one pass over the blocks by key, for the gradients of queries, keys and values together.

Five products a block: scores, dp, dv, dk, dq (FlashAttention-2, arXiv 2307.08691, algorithm 2). Scores are held as key x query,
so that dv and dk need no transposition, and lse is a row. dk and dv stay in VMEM as long as a block of keys lasts. dq comes by
in another order, and is kept in HBM in float32: `_Accumulator` reads and writes its blocks while others are computed.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import tpu_common as common
from pallas_kernels.attention.lists import EMPTY, FULL, PARTIAL
from pallas_kernels.attention.tpu_common import Call, Layout, Lists

SUB = 512  # keys that are looked at together
SLOTS = 3  # blocks of dq in VMEM: one that is written back, one that is added to, one that is fetched ahead
NONE = -1
HELD, AHEAD, WRITING, SLOT = range(4)  # the accumulator's words of scalar memory


def backward(call: Call, layout: Layout, q, k, v, lists: Lists, offset, segments, do, rows_of):
    """(dq, dk, dv) in float32, without the factor `scale` of dq and dk; dk and dv are per head of the kernel.

    rows_of: float32 [batch, heads, rows, 2, block], lse in units of log 2 (+inf where nothing is to be had from a query) and
    rowsum(do * out) - dlse. segments: (int32 [batch, rows, 1, block], int32 [batch, columns * block]) or None.
    """
    sizes, rows = call.backward, call.backward.q_block * call.fold
    b, h, _, d = q.shape
    d_v, kv_len = v.shape[-1], k.shape[2]
    lanes = common.LANES if rows % common.LANES == 0 else rows
    # heads of a group that share a list take turns at an entry, and their dk and dv are summed in VMEM
    inner = call.group if layout.heads < call.heads or call.heads == call.kv_heads else 1
    outer = h // inner
    scalars = [lists.words, offset] + ([] if lists.which is None else [lists.which])

    def entry(b, o, i):
        return layout.start(call, b, o * inner) + i

    def head(o, g):
        return o * inner + g if inner > 1 else o

    def query(b, o, i, g, words, *_):
        return b, head(o, g), common.column_of(words[entry(b, o, i)]), 0

    def row_facts(b, o, i, g, words, *_):
        return (*query(b, o, i, g, words), 0)

    def key(b, o, i, g, words, *_):
        return b, head(o, 0) // call.group if call.group > 1 else o, common.row_of(words[entry(b, o, i)]), 0

    def key_out(b, o, i, g, words, *_):
        return b, o, common.row_of(words[entry(b, o, i)]), 0

    operands = [q, k, v, do, rows_of]
    specs = [
        pl.BlockSpec((None, None, rows, d), query),
        pl.BlockSpec((None, None, sizes.kv_block, d), key),
        pl.BlockSpec((None, None, sizes.kv_block, d_v), key),
        pl.BlockSpec((None, None, rows, d_v), query),
        pl.BlockSpec((None, None, None, 2, rows), row_facts),
    ]
    if lists.which is not None:
        operands.append(lists.patterns)
        specs.append(
            pl.BlockSpec(
                (None, *lists.patterns.shape[1:]), lambda b, o, i, g, words, offset, which: (which[entry(b, o, i)], 0, 0)
            )
        )
    if segments is not None:
        operands += [segments[0], jnp.broadcast_to(segments[1][..., None], (*segments[1].shape, lanes))]
        specs += [
            pl.BlockSpec(
                (None, None, 1, rows), lambda b, o, i, g, words, *_: (b, common.column_of(words[entry(b, o, i)]), 0, 0)
            ),
            pl.BlockSpec(
                (None, sizes.kv_block, lanes), lambda b, o, i, g, words, *_: (b, common.row_of(words[entry(b, o, i)]), 0)
            ),
        ]
    blocks = jax.ShapeDtypeStruct((b, h * sizes.rows, rows, d), jnp.float32)
    operands.append(jnp.zeros(blocks.shape, blocks.dtype))
    specs.append(pl.BlockSpec(memory_space=pl.ANY))
    dq, dk, dv = pl.pallas_call(
        functools.partial(_kernel, call, layout, inner, lists.which is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(b, outer, layout.n, inner),
            in_specs=specs,
            out_specs=[
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec((None, None, sizes.kv_block, d), key_out),
                pl.BlockSpec((None, None, sizes.kv_block, d_v), key_out),
            ],
            scratch_shapes=[
                pltpu.VMEM((SLOTS, rows, d), jnp.float32),
                pltpu.SMEM((4,), jnp.int32),
                pltpu.SemaphoreType.DMA((SLOTS,)),
                pltpu.SemaphoreType.DMA((SLOTS,)),
            ],
        ),
        out_shape=[
            blocks,
            jax.ShapeDtypeStruct((b, outer, kv_len, d), jnp.float32),
            jax.ShapeDtypeStruct((b, outer, kv_len, d_v), jnp.float32),
        ],
        input_output_aliases={len(scalars) + len(operands) - 1: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")),
        cost_estimate=_cost(call, layout, q, k, v),
        interpret=call.interpret,
        name="sparse_attention_backward",
    )(*scalars, *operands)
    return dq.reshape(q.shape), dk, dv


def _cost(call: Call, layout: Layout, q, k, v) -> pl.CostEstimate | None:
    if layout.visited is None:
        return None
    sizes, rows = call.backward, call.backward.q_block * call.fold
    blocks = layout.visited * (call.batch // layout.batch) * (call.heads // layout.heads)
    pairs, d, d_v = blocks * rows * sizes.kv_block, k.shape[-1], v.shape[-1]
    read_blocks = blocks * rows * ((d + d_v) * q.dtype.itemsize + 8 + 2 * 4 * d)
    return pl.CostEstimate(
        flops=2 * pairs * (3 * d + 2 * d_v),
        transcendentals=pairs,
        bytes_accessed=read_blocks + (k.size + v.size) * (k.dtype.itemsize + 4 * call.group),
    )


class _Accumulator:
    """Sums blocks [rows, d] of an HBM array in VMEM: reads a block, lets it be added to, and writes it back when another comes.

    Three slots go round: while one is added to, the one after it is filled with the block of the next step, and the one before
    it is on its way back. Two rules keep it free of races. A slot is filled only after its write has ended: the write before
    last is waited for when another one starts. A block is read only after its write has ended: one that is being written is not
    fetched ahead, and whoever needs it waits.
    """

    def __init__(self, blocks: Any, slots: Any, words: Any, reads: Any, writes: Any):
        self.blocks, self.slots, self.words, self.reads, self.writes = blocks, slots, words, reads, writes

    def _read(self, block: Any, slot: Any) -> Any:
        return pltpu.make_async_copy(self.blocks.at[block], self.slots.at[slot], self.reads.at[slot])

    def _write(self, block: Any, slot: Any) -> Any:
        return pltpu.make_async_copy(self.slots.at[slot], self.blocks.at[block], self.writes.at[slot])

    def start(self) -> None:
        for word in (HELD, AHEAD, WRITING):
            self.words[word] = NONE
        self.words[SLOT] = 0

    def _await_write(self) -> None:
        self._write(self.words[WRITING], _before(self.words[SLOT])).wait()
        self.words[WRITING] = NONE

    def turn_to(self, block: Any) -> None:
        """Makes `block` the one in `slot`."""

        @pl.when(self.words[HELD] != block)
        def _():
            pl.when(self.words[WRITING] != NONE)(self._await_write)
            slot = self.words[SLOT]

            @pl.when(self.words[HELD] != NONE)
            def _():
                self._write(self.words[HELD], slot).start()
                self.words[WRITING] = self.words[HELD]

            after = _after(slot)
            self.words[SLOT] = after

            @pl.when(self.words[AHEAD] != block)
            def _():
                pl.when(self.words[WRITING] == block)(self._await_write)
                self._read(block, after).start()

            self.words[AHEAD] = NONE
            self.words[HELD] = block
            self._read(block, after).wait()

    def fetch_ahead(self, block: Any) -> None:
        """Starts to read the block of the next step."""
        fresh = (block != self.words[HELD]) & (block != self.words[WRITING])

        @pl.when(fresh)
        def _():
            self._read(block, _after(self.words[SLOT])).start()
            self.words[AHEAD] = block

    def add(self, value: Any) -> None:
        slot = self.words[SLOT]
        self.slots[slot] = self.slots[slot] + value

    def finish(self) -> None:
        """Writes what is left, and waits for it."""
        pl.when(self.words[WRITING] != NONE)(self._await_write)

        @pl.when(self.words[HELD] != NONE)
        def _():
            last = self._write(self.words[HELD], self.words[SLOT])
            last.start()
            last.wait()


def _after(slot: Any) -> Any:
    return jnp.where(slot == SLOTS - 1, 0, slot + 1)


def _before(slot: Any) -> Any:
    return jnp.where(slot == 0, SLOTS - 1, slot - 1)


def _kernel(call: Call, layout: Layout, inner: int, patterned: bool, words, offset, *refs: Any) -> None:
    refs = list(refs)
    if patterned:
        refs.pop(0)
    q_ref, k_ref, v_ref, do_ref, facts_ref = (refs.pop(0) for _ in range(5))
    pattern_ref = refs.pop(0) if patterned else None
    q_segments_ref, kv_segments_ref = (refs.pop(0), refs.pop(0)) if call.segments else (None, None)
    _, dq_ref, dk_ref, dv_ref, slots_ref, state_ref, reads, writes = refs
    b, o, i, g = (pl.program_id(axis) for axis in range(4))
    h = o * inner + g
    start = layout.start(call, b, o * inner)
    word = words[start + i]
    kind = word & common.KIND
    sizes = call.backward
    rows = sizes.q_block * call.fold
    sub = min(SUB, sizes.kv_block) if sizes.kv_block % SUB == 0 else sizes.kv_block
    shift = offset[b if offset.shape[0] > 1 else 0]
    dq = _Accumulator(dq_ref.at[b], slots_ref, state_ref, reads, writes)
    mine = h * sizes.rows + common.column_of(word)

    @pl.when((i == 0) & (g == 0))
    def _():
        dq.start()

    @pl.when(((word & common.FIRST) != 0) & (g == 0))
    def _():
        dk_ref[...] = jnp.zeros_like(dk_ref)
        dv_ref[...] = jnp.zeros_like(dv_ref)

    @pl.when(kind != EMPTY)
    def _():
        dq.turn_to(mine)
        wraps = g == inner - 1
        next_entry = jnp.minimum(i + wraps.astype(jnp.int32), layout.n - 1)
        next_word = words[start + next_entry]
        next_head = o * inner + jnp.where(wraps, 0, g + 1)
        follows = ((i < layout.n - 1) | ~wraps) & ((next_word & common.KIND) != EMPTY)
        upcoming = next_head * sizes.rows + common.column_of(next_word)
        pl.when(follows)(lambda: dq.fetch_ahead(upcoming))

    def block(masked: bool) -> None:
        q, do = q_ref[...], do_ref[...]
        lse, delta = facts_ref[:1], facts_ref[1:]
        for first in range(0, sizes.kv_block, sub):
            here = slice(first, first + sub)
            at = None
            if masked or call.score_mod is not None:
                kv_first = common.row_of(word) * sizes.kv_block + first
                at = common.place(call, sizes, b, h, shift, common.column_of(word), kv_first, sub, q_axis=1)
            k, v = k_ref[here], v_ref[here]
            product = common.dot(call, k, q, common.NT)
            x, pull = common.differentiated(call, at, product)
            p = jnp.exp2(x - lse)
            if masked:
                pattern = pattern_ref[here] if patterned else None
                ids = (None, None)
                if call.segments:
                    ids = q_segments_ref[...], common.across(kv_segments_ref[here], rows)
                seen = common.visible(call, sizes, at, pattern, *ids)
                p = jnp.where(seen, p, 0)
            dv_ref[here] += common.dot(call, p.astype(do.dtype), do, common.NN)
            dp = common.dot(call, v, do, common.NT)
            ds = pull(p * (dp - delta))
            if call.score_mod is not None:
                real = at.q_index < shift + sizes.q_len
                ds = jnp.where(seen & real if masked else real, ds, 0)
            ds = ds.astype(q.dtype)
            dk_ref[here] += common.dot(call, ds, q, common.NN)
            dq.add(common.dot(call, ds, k, common.TN))

    for which, masked in ((FULL, False), (PARTIAL, True)):
        if which in layout.kinds:
            pl.when(kind == which)(functools.partial(block, masked))

    pl.when((i == layout.n - 1) & (g == inner - 1))(dq.finish)
