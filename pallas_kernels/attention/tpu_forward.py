"""Forward pass of the TPU kernel: an online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867) over the blocks of a list.

The grid goes through (sequence, head, entry of the list): FlashAttention-2's loop over the keys of a block of queries (Dao
2023, arXiv 2307.08691, algorithm 1), with only the blocks in it that are not empty.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import tpu_common as common
from pallas_kernels.attention.lists import FULL, PARTIAL
from pallas_kernels.attention.tpu_common import Call, Layout, Lists

# The maximum of no scores. Finite, so that differences to it are no NaN, and above what is masked: exp2(-inf - LEAST) is 0.
LEAST = -1e38
SUB = 512  # keys that are looked at together


def forward(call: Call, layout: Layout, q, k, v, lists: Lists, offset, segments, sinks):
    """(out [batch, heads, rows * block, d_v] in q's dtype, lse float32 [batch, heads, rows, 1, block]).

    segments: (int32 [batch, rows * block], int32 [batch, columns, 1, block]) or None; sinks: float32 [heads, block] or None.
    """
    sizes, rows = call.forward, call.forward.q_block * call.fold
    b, h, _, d = q.shape
    d_v = v.shape[-1]
    lanes = common.LANES if sizes.kv_block % common.LANES == 0 else sizes.kv_block
    scalars = [lists.words, offset] + ([] if lists.which is None else [lists.which])
    entry = functools.partial(layout.start, call)

    def query(b, h, i, words, *_):
        return b, h, common.row_of(words[entry(b, h) + i]), 0

    def key(b, h, i, words, *_):
        return b, h // call.group if call.group > 1 else h, common.column_of(words[entry(b, h) + i]), 0

    operands = [q, k, v]
    specs = [
        pl.BlockSpec((None, None, rows, d), query),
        pl.BlockSpec((None, None, sizes.kv_block, d), key),
        pl.BlockSpec((None, None, sizes.kv_block, d_v), key),
    ]
    if lists.which is not None:
        operands.append(lists.patterns)
        specs.append(
            pl.BlockSpec(
                (None, *lists.patterns.shape[1:]), lambda b, h, i, words, offset, which: (which[entry(b, h) + i], 0, 0)
            )
        )
    if segments is not None:
        # ids of queries the same in all lanes, those of keys along the lanes: comparing them moves nothing across lanes
        operands += [jnp.broadcast_to(segments[0][..., None], (*segments[0].shape, lanes)), segments[1]]
        specs += [
            pl.BlockSpec((None, rows, lanes), lambda b, h, i, words, *_: (b, common.row_of(words[entry(b, h) + i]), 0)),
            pl.BlockSpec(
                (None, None, 1, sizes.kv_block),
                lambda b, h, i, words, *_: (b, common.column_of(words[entry(b, h) + i]), 0, 0),
            ),
        ]
    if sinks is not None:
        operands.append(jnp.broadcast_to(sinks[..., None] * common.LOG2E, (*sinks.shape, lanes)))
        specs.append(pl.BlockSpec((None, rows, lanes), lambda b, h, i, *_: (h, 0, 0)))
    return pl.pallas_call(
        functools.partial(_kernel, call, layout, lists.which is not None, sinks is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(b, h, layout.n),
            in_specs=specs,
            out_specs=[
                pl.BlockSpec((None, None, rows, d_v), query),
                pl.BlockSpec((None, None, None, 1, rows), lambda b, h, i, words, *_: (*query(b, h, i, words), 0)),
            ],
            scratch_shapes=[pltpu.VMEM((rows, width), jnp.float32) for width in (lanes, lanes, d_v)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((b, h, sizes.rows * rows, d_v), q.dtype),
            jax.ShapeDtypeStruct((b, h, sizes.rows, 1, rows), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), disable_bounds_checks=True
        ),
        cost_estimate=_cost(call, layout, q, k, v),
        interpret=call.interpret,
        name="sparse_attention_forward",
    )(*scalars, *operands)


def _cost(call: Call, layout: Layout, q, k, v) -> pl.CostEstimate | None:
    if layout.visited is None:
        return None
    sizes, rows = call.forward, call.forward.q_block * call.fold
    blocks = layout.visited * (call.batch // layout.batch) * (call.heads // layout.heads)
    pairs, width = blocks * rows * sizes.kv_block, k.shape[-1] + v.shape[-1]
    out = q.size // q.shape[-1] * v.shape[-1]
    return pl.CostEstimate(
        flops=2 * pairs * width,
        transcendentals=pairs,
        bytes_accessed=(q.size + out + blocks * sizes.kv_block * width) * q.dtype.itemsize + out // v.shape[-1] * 4,
    )


def _kernel(call: Call, layout: Layout, patterned: bool, sunk: bool, words, offset, *refs: Any) -> None:
    refs = list(refs)
    if patterned:
        refs.pop(0)
    q_ref, k_ref, v_ref = (refs.pop(0) for _ in range(3))
    pattern_ref = refs.pop(0) if patterned else None
    q_segments_ref, kv_segments_ref = (refs.pop(0), refs.pop(0)) if call.segments else (None, None)
    sink_ref = refs.pop(0) if sunk else None
    out_ref, lse_ref, most_ref, total_ref, sum_ref = refs
    b, h = pl.program_id(0), pl.program_id(1)
    word = words[layout.start(call, b, h) + pl.program_id(2)]
    kind = word & common.KIND
    sizes = call.forward
    lanes = most_ref.shape[1]
    sub = min(SUB, sizes.kv_block) if sizes.kv_block % SUB == 0 else sizes.kv_block
    shift = offset[b if offset.shape[0] > 1 else 0]

    @pl.when((word & common.FIRST) != 0)
    def _start():
        most_ref[...] = jnp.full_like(most_ref, LEAST)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def block(masked: bool) -> None:
        q = q_ref[...]
        for first in range(0, sizes.kv_block, sub):
            here = slice(first, first + sub)
            at = None
            if masked or call.score_mod is not None:
                kv_first = common.column_of(word) * sizes.kv_block + first
                at = common.place(call, sizes, b, h, shift, common.row_of(word), kv_first, sub, q_axis=0)
            x = common.logits(call, at, common.dot(call, q, k_ref[here], common.NT))
            if masked:
                pattern = pattern_ref[:, here] if patterned else None
                ids = (None, None)
                if call.segments:
                    ids = common.across(q_segments_ref[...], sub), kv_segments_ref[:, here]
                x = jnp.where(common.visible(call, sizes, at, pattern, *ids), x, -jnp.inf)
            before = most_ref[...]
            most = jnp.maximum(before, x.max(axis=1, keepdims=True))
            p = jnp.exp2(x - common.across(most, sub))
            rescale = jnp.exp2(before - most)
            # lanes are summed up once, at the end of the row
            part = functools.reduce(jnp.add, [p[:, i : i + lanes] for i in range(0, sub, lanes)])
            most_ref[...] = most
            total_ref[...] = total_ref[...] * rescale + part
            value = common.dot(call, p.astype(v_ref.dtype), v_ref[here], common.NN)
            sum_ref[...] = sum_ref[...] * common.across(rescale, sum_ref.shape[1]) + value

    for which, masked in ((FULL, False), (PARTIAL, True)):
        if which in layout.kinds:
            pl.when(kind == which)(functools.partial(block, masked))

    @pl.when((word & common.LAST) != 0)
    def _finish():
        most = most_ref[...]
        total = jnp.broadcast_to(total_ref[...].sum(axis=1, keepdims=True), most.shape)
        summed = sum_ref[...]
        if sunk:
            higher = jnp.maximum(most, sink_ref[...])
            rescale = jnp.exp2(most - higher)
            total, most = total * rescale + jnp.exp2(sink_ref[...] - higher), higher
            summed = summed * common.across(rescale, summed.shape[1])
        nothing = total == 0
        inverse = 1 / jnp.where(nothing, 1, total)
        out_ref[...] = (summed * common.across(inverse, summed.shape[1])).astype(out_ref.dtype)
        lse = jnp.where(nothing, -jnp.inf, (most + jnp.log2(total)) * (1 / common.LOG2E))
        lse_ref[...] = lse.T[:1]
