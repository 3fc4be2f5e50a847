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
NONE = -1
HELD, TURNS = range(2)  # the accumulator's words of scalar memory: which block it holds, and how many there were


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
        return b, o, 0, common.row_of(words[entry(b, o, i)])

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
    blocks = jax.ShapeDtypeStruct((b, h * sizes.rows, d, rows), jnp.float32)
    operands.append(jnp.zeros(blocks.shape, blocks.dtype))
    specs.append(pl.BlockSpec(memory_space=pltpu.HBM))
    dq, dk, dv = pl.pallas_call(
        functools.partial(_kernel, call, layout, inner, lists.which is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(b, outer, layout.n, inner),
            in_specs=specs,
            out_specs=[
                pl.BlockSpec(memory_space=pltpu.HBM),
                pl.BlockSpec((None, None, d, sizes.kv_block), key_out),
                pl.BlockSpec((None, None, d_v, sizes.kv_block), key_out),
            ],
            scratch_shapes=[
                pltpu.VMEM((2, d, rows), jnp.float32),
                pltpu.SMEM((2,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[
            blocks,
            jax.ShapeDtypeStruct((b, outer, d, kv_len), jnp.float32),
            jax.ShapeDtypeStruct((b, outer, d_v, kv_len), jnp.float32),
        ],
        input_output_aliases={len(scalars) + len(operands) - 1: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), disable_bounds_checks=True
        ),
        cost_estimate=_cost(call, layout, q, k, v),
        interpret=call.interpret,
        name="sparse_attention_backward",
    )(*scalars, *operands)
    dq = dq.reshape(b, h, sizes.rows, d, rows).swapaxes(3, 4).reshape(q.shape)
    return dq, dk.swapaxes(2, 3), dv.swapaxes(2, 3)


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
    """Sums blocks of an HBM array in VMEM: a block is read, added to for as many steps as it is the same, and written back when
    another one comes. A step reads its block while it computes, and writes that of the step before, from the other slot.

    It is free of races by one rule: who turns to another block waits first for the last write that was started, that of the
    block before the held one. So its slot is free for the block to come; and whichever that is, no write of it is under way,
    since the write that starts now is of another.
    """

    def __init__(self, blocks: Any, slots: Any, state: Any, reads: Any, writes: Any):
        self.blocks, self.slots, self.state, self.reads, self.writes = blocks, slots, state, reads, writes

    def _read(self, block: Any, slot: Any) -> Any:
        return pltpu.make_async_copy(self.blocks.at[block], self.slots.at[slot], self.reads.at[slot])

    def _write(self, block: Any, slot: Any) -> Any:
        return pltpu.make_async_copy(self.slots.at[slot], self.blocks.at[block], self.writes.at[slot])

    def start(self) -> None:
        self.state[HELD] = NONE
        self.state[TURNS] = 0

    def _write_held(self, held: Any, turns: Any) -> None:
        # an earlier block is on its way back as soon as there were two; a copy is waited for by its size
        pl.when(turns >= 2)(lambda: self._write(0, (turns - 1) & 1).wait())
        pl.when(turns >= 1)(lambda: self._write(held, turns & 1).start())

    def turn_to(self, block: Any, needed: Any) -> Any:
        """Starts to read `block` where it is `needed` and is not held. Returns whether it did: then `add` has to wait."""
        held, turns = self.state[HELD], self.state[TURNS]
        turned = needed & (held != block)

        @pl.when(turned)
        def _():
            self._write_held(held, turns)
            self._read(block, (turns + 1) & 1).start()
            self.state[HELD] = block
            self.state[TURNS] = turns + 1

        return turned

    def add(self, value: Any, turned: Any) -> None:
        slot = self.state[TURNS] & 1
        pl.when(turned)(lambda: self._read(0, slot).wait())
        self.slots[slot] = self.slots[slot] + value

    def finish(self) -> None:
        """Writes what is held, and waits for it."""
        held, turns = self.state[HELD], self.state[TURNS]
        self._write_held(held, turns)
        pl.when(turns >= 1)(lambda: self._write(0, turns & 1).wait())


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

    turned = dq.turn_to(mine, kind != EMPTY)

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
            dp = common.dot(call, v, do, common.NT)
            x, pull = common.differentiated(call, at, product)
            x = x - lse
            if masked:
                pattern = pattern_ref[here] if patterned else None
                ids = (None, None)
                if call.segments:
                    ids = q_segments_ref[...], common.across(kv_segments_ref[here], rows)
                seen = common.visible(call, sizes, at, pattern, *ids)
                x = jnp.where(seen, x, -jnp.inf)
            p = jnp.exp2(x)
            ds = pull(p * (dp - delta))
            if call.score_mod is not None:
                real = at.q_index < shift + sizes.q_len
                ds = jnp.where(seen & real if masked else real, ds, 0)
            # dv', dk' and dq': so the large factor stays as it is, and the product has all lanes full
            dv_ref[:, here] += common.dot(call, do, p.astype(do.dtype), common.TT)
            ds = ds.astype(q.dtype)
            dk_ref[:, here] += common.dot(call, q, ds, common.TT)
            dq.add(common.dot(call, k, ds, common.TN), turned if first == 0 else False)

    for which, masked in ((FULL, False), (PARTIAL, True)):
        if which in layout.kinds:
            pl.when(kind == which)(functools.partial(block, masked))

    pl.when((i == layout.n - 1) & (g == inner - 1))(dq.finish)
