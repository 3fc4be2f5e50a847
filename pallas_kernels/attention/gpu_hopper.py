"""Block-sparse attention for Hopper (sm_90a) through Mosaic GPU: the forward pass. Backward it goes through Pallas-Triton.

Three warpgroups a program, as in FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608, section 3.1): one fetches blocks of
keys and values by TMA, at the places that the block list names, into a ring of shared memory; two have 64 queries each,
multiply with wgmma and take turns, so that one's softmax runs while the other multiplies. Who reads and who writes a slot of
the ring is settled by four barriers a slot: keys and values have come (counted in bytes by TMA), keys and values are done
with (one arrival a reader).

A value that no query may see must not be multiplied by its weight of 0 if it is not finite, and wgmma reads values from
shared memory, where no register passes. So XLA cleans keys and values before: values become finite, and a key that is spoilt,
or has a spoilt value, becomes NaN throughout, which reaches all queries that see it and no other.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import gpu_call, gpu_triton
from pallas_kernels.attention.block_mask import inner, own_blocks
from pallas_kernels.attention.blocks import Blocks, block_sizes
from pallas_kernels.attention.gpu_call import Data, Spec, like

LOG2E = math.log2(math.e)
READERS = 2  # warpgroups that compute
ROWS = 64  # queries of each: what one wgmma has
LEAST_QUERIES = 64  # below, the tiles would be mostly padding, and keys would be cleaned for few
DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 128)


def attend(q, k, v, mask, *, q_offset, score_mod, segment_ids, sinks, softcap, scale, interpret=False):
    """As `reference.attend`. interpret: Mosaic GPU's InterpretGPUParams; Triton's kernels are interpreted too then."""
    blocks = check(q, v, mask, score_mod, segment_ids, scale)
    return gpu_call.attend(
        (forward, gpu_triton.backward), blocks, q, k, v, mask, q_offset=q_offset, score_mod=score_mod, segment_ids=segment_ids,
        sinks=sinks, softcap=softcap, scale=scale, interpret=interpret,
    )  # fmt: skip


def check(q: jax.Array, v: jax.Array, mask: Any, score_mod: Any, segment_ids: Any, scale: float) -> tuple[Blocks, Blocks]:
    """The blocks of the lists of both passes. Raises NotImplementedError where this kernel is not for the call."""
    if q.dtype.name not in DTYPES:
        raise NotImplementedError(f"q: {q.dtype}, and the Hopper kernel has {' and '.join(DTYPES)}")
    for name, x in (("q", q), ("v", v)):
        if x.shape[3] not in HEAD_DIMS:
            raise NotImplementedError(f"{name}: head dimension {x.shape[3]}, and the Hopper kernel has {HEAD_DIMS}")
    if q.shape[1] < LEAST_QUERIES:
        raise NotImplementedError(f"q: {q.shape[1]} queries, and the Hopper kernel is for {LEAST_QUERIES} or more")
    if score_mod is not None:
        raise NotImplementedError("score_mod: not in the Hopper kernel")
    if segment_ids is not None:
        raise NotImplementedError("segment_ids: not in the Hopper kernel")
    if scale <= 0:
        raise NotImplementedError("scale: the Hopper kernel wants it positive")
    if not inner(mask).analytic:
        raise NotImplementedError("mask: it looks at arrays, which the Hopper kernel does not")
    own = own_blocks(mask)
    if own is None:
        here = block_sizes("gpu", "hopper", q.shape[1], max(q.shape[3], v.shape[3]))[0]
        return here, gpu_triton.check(q, v, mask)[1]
    if own.q % (READERS * ROWS) or own.kv % 64:
        raise NotImplementedError(f"mask: blocks of {own.q} x {own.kv}, wanted multiples of 128 x 64")
    return gpu_triton.check(q, v, mask)


class _Plan(NamedTuple):
    spec: Spec
    groups: int  # query heads a key head
    kv: int  # keys of a tile
    stages: int  # of the ring
    sinks: bool
    offsets: int  # how many there are; 0: static


def forward(spec: Spec, q, k, v, sinks, data: Data):
    """q [B, T, H, D], k [B, S, KV, D], v [B, S, KV, Dv], padded to whole blocks -> out [B, T, H, Dv], lse [B, H, T]."""
    b, t, h, d = q.shape
    d_v = v.shape[3]
    kv = 128 if spec.forward.kv % 128 == 0 else 64
    stages = 4 if max(d, d_v) * kv <= 64 * 128 else 2
    offsets = 0 if data.q_offset is None else data.q_offset.shape[0]
    plan = _Plan(spec, h // k.shape[2], kv, stages, sinks is not None, offsets)
    lists = data.forward.rows
    operands = [q, *_cleaned(k, v), jnp.asarray(lists.ends), jnp.asarray(lists.other)]
    operands += [x for x in (sinks, data.q_offset) if x is not None]
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # as wgmma reads it: 64 elements of 2 bytes a row
    tile = functools.partial(plgpu.SMEM, dtype=q.dtype, transforms=tiled)

    def sparse_attention_hopper(*refs):
        pl.run_scoped(
            functools.partial(_program, plan, refs),
            q=tile((READERS, ROWS, d)),
            out=tile((READERS, ROWS, d_v)) if d != d_v else None,
            k=tile((stages, kv, d)),
            v=tile((stages, kv, d_v)),
            lse=plgpu.SMEM((READERS, ROWS), jnp.float32),
            q_come=plgpu.Barrier(num_barriers=READERS),
            k_come=plgpu.Barrier(num_barriers=stages),
            v_come=plgpu.Barrier(num_barriers=stages),
            k_done=plgpu.Barrier(num_arrivals=READERS, num_barriers=stages),
            v_done=plgpu.Barrier(num_arrivals=READERS, num_barriers=stages),
            turn=plgpu.Barrier(num_arrivals=READERS),
            collective_axes="warpgroup",
        )

    rows = -(-spec.q_len // spec.forward.q) * (spec.forward.q // (READERS * ROWS))
    return plgpu.kernel(
        sparse_attention_hopper,
        out_type=(like(q, (b, t, h, d_v), q.dtype), like(q, (b, h, t), jnp.float32)),
        grid=(h, rows, b),
        grid_names=("head", "row", "sequence"),
        num_threads=READERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=spec.interpret or None,
    )(*operands)


def _cleaned(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    fine = jnp.isfinite(k).all(-1) & jnp.isfinite(v).all(-1)
    return jnp.where(fine[..., None], k, jnp.nan), jnp.where(jnp.isfinite(v), v, 0)


def _program(plan: _Plan, refs: tuple[Any, ...], **scratch: Any) -> None:
    spec = plan.spec
    q_ref, k_ref, v_ref, ends_ref, other_ref, *more, out_ref, lse_ref = refs
    sinks_ref = more.pop(0) if plan.sinks else None
    b, h = lax.axis_index("sequence"), lax.axis_index("head")
    # The last rows first: under a causal mask they are the longest, and the short ones then fill the end.
    tile = lax.axis_size("row") - 1 - lax.axis_index("row")
    row = _split(tile, spec.forward.q // (READERS * ROWS))[0]
    at = (b if ends_ref.shape[0] > 1 else 0, h if ends_ref.shape[1] > 1 else 0)
    parts = spec.forward.kv // plan.kv
    first, partials, end = (ends_ref[(*at, 2 * row + i)] for i in range(3))
    full, every = (partials - first) * parts, (end - first) * parts

    def kv_first(step):
        """The first key of the tile at this step."""
        entry, part = _split(step, parts)
        at = (b if other_ref.shape[0] > 1 else 0, h if other_ref.shape[1] > 1 else 0)
        return other_ref[(*at, first + entry)] * spec.forward.kv + part * plan.kv

    place = _Place(b, h, tile * (READERS * ROWS), kv_first, full, every)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < READERS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        offset = spec.q_offset
        if plan.offsets:
            offset = more[-1][b if plan.offsets > 1 else 0]
        sink = None if sinks_ref is None else sinks_ref[h]
        _read(plan, place, warpgroup, offset, sink, q_ref, out_ref, lse_ref, **scratch)

    @pl.when(warpgroup == READERS)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        _fetch(plan, place, k_ref, v_ref, **scratch)


class _Place(NamedTuple):
    b: Any
    h: Any
    q_first: Any  # of the program
    kv_first: Any  # of a step
    full: Any  # steps that go through FULL blocks
    every: Any  # steps


def _split(i: Any, parts: int) -> tuple[Any, Any]:
    """(i // parts, i % parts) of i >= 0."""
    return (i, 0) if parts == 1 else (lax.div(i, jnp.int32(parts)), lax.rem(i, jnp.int32(parts)))


def _fetch(plan: _Plan, place: _Place, k_ref, v_ref, *, k, v, k_come, v_come, k_done, v_done, **_: Any) -> None:
    """Fills the ring, slot after slot; one that was filled before, when both readers are done with it."""
    g = _split(place.h, plan.groups)[0]

    def fetch(step, refill):
        slot = lax.rem(step, jnp.int32(plan.stages))
        here = (place.b, pl.ds(place.kv_first(step), plan.kv), g)
        for ref, ring, come, done in ((k_ref, k, k_come, k_done), (v_ref, v, v_come, v_done)):
            if refill:
                plgpu.barrier_wait(done.at[slot])
            plgpu.copy_gmem_to_smem(ref.at[here], ring.at[slot], come.at[slot])

    def drain(step):
        slot = lax.rem(step, jnp.int32(plan.stages))
        plgpu.barrier_wait(k_done.at[slot])
        plgpu.barrier_wait(v_done.at[slot])

    once = jnp.minimum(place.every, plan.stages)
    lax.fori_loop(0, once, lambda step, _: fetch(step, False), None)
    lax.fori_loop(once, place.every, lambda step, _: fetch(step, True), None)
    # What was filled last is waited for as well: every phase of a barrier is seen by who waits on it, as the interpreter wants.
    lax.fori_loop(place.every - once, place.every, lambda step, _: drain(step), None)


def _read(plan: _Plan, place: _Place, reader, offset, sink, q_ref, out_ref, lse_ref, *, q, out, k, v, lse, q_come, k_come,
          v_come, k_done, v_done, turn) -> None:  # fmt: skip
    """Goes through all steps with 64 queries."""
    spec, interpret = plan.spec, bool(plan.spec.interpret)
    q_tile, lse_tile, out_tile = q.at[reader], lse.at[reader], (q if out is None else out).at[reader]
    q_first = place.q_first + reader * ROWS
    rows = (place.b, pl.ds(q_first, ROWS), place.h)
    plgpu.copy_gmem_to_smem(q_ref.at[rows], q_tile, q_come.at[reader])
    plgpu.barrier_wait(q_come.at[reader])
    wgmma = None if interpret else plgpu.Layout.WGMMA  # the interpreter has no layouts
    d_v, scores_shape = v.shape[2], (ROWS, plan.kv)
    factor = spec.scale * LOG2E if spec.softcap is None else LOG2E

    def column(value):
        return _laid(jnp.full((ROWS,), value, jnp.float32), wgmma and wgmma.reduce(1))

    def hand_over():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    def step(i, carry, partial):
        acc, top, total = carry
        slot = lax.rem(i, jnp.int32(plan.stages))
        plgpu.barrier_wait(k_come.at[slot])
        score = _scores(q_tile, k.at[slot], hand_over, scores_shape, interpret)
        plgpu.barrier_arrive(k_done.at[slot])
        if spec.softcap is not None:
            # softcap * tanh(scale * score / softcap), by a power of 2, which is exacter than the hardware's tanh
            grown = jnp.exp2(score * (2 * LOG2E * spec.scale / spec.softcap))
            score = spec.softcap - 2 * spec.softcap / (1 + grown)
        if partial:
            q_index, kv_index = (plgpu.broadcasted_iota(jnp.int32, scores_shape, axis, layout=wgmma) for axis in (0, 1))
            q_position, kv_index = q_index + (q_first + offset), kv_index + place.kv_first(i)
            assert spec.mask is not None
            seen = spec.mask(place.b, place.h, q_position, kv_index)
            if spec.kv_len % spec.forward.kv:
                seen = seen & (kv_index < spec.kv_len)
            score = jnp.where(seen, score, -jnp.inf)
        high = jnp.maximum(top, score.max(axis=1) * factor)
        base = jnp.where(high == -jnp.inf, 0.0, high)
        weight = jnp.exp2(score * factor - lax.broadcast_in_dim(base, scores_shape, [0]))
        shrink = jnp.exp2(top - base)
        total = total * shrink + weight.sum(axis=1)
        acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
        weight = weight.astype(q_ref.dtype)
        # What was computed so far shall not sink below the barriers: the softmax is what the other's turn hides.
        acc, high, total, weight = lax.optimization_barrier((acc, high, total, weight))
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(v_come.at[slot])
        plgpu.barrier_wait(turn)
        acc = _summed(acc, weight, v.at[slot], interpret)
        plgpu.barrier_arrive(v_done.at[slot])
        return acc, high, total

    top, total = column(-jnp.inf), column(0.0)
    if sink is not None:
        top = column(sink * LOG2E)
        total = jnp.where(top == -jnp.inf, 0.0, 1.0)
    acc = _laid(jnp.zeros((ROWS, d_v), jnp.float32), wgmma)
    # The second reader starts half a step later.
    pl.when(reader == 1)(hand_over)
    carry = lax.fori_loop(0, place.full, functools.partial(step, partial=False), (acc, top, total))
    acc, top, total = lax.fori_loop(place.full, place.every, functools.partial(step, partial=True), carry)
    pl.when(reader == 0)(hand_over)
    nothing = total == 0.0
    total = jnp.where(nothing, 1.0, total)
    out_tile[...] = (acc * lax.broadcast_in_dim(1.0 / total, acc.shape, [0])).astype(out_ref.dtype)
    lse_tile[...] = jnp.where(nothing, -jnp.inf, (top * (1 / LOG2E) + jnp.log(total)))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_tile, out_ref.at[rows])
    plgpu.copy_smem_to_gmem(lse_tile, lse_ref.at[place.b, place.h, pl.ds(q_first, ROWS)])
    plgpu.wait_smem_to_gmem(0)


def _laid(x: jax.Array, layout: Any) -> jax.Array:
    return x if layout is None else plgpu.layout_cast(x, layout)


def _scores(q_tile, k_tile, hand_over, shape, interpret: bool) -> jax.Array:
    """float32 [queries, keys]; hands over when the products are under way."""
    if interpret:  # which has no wgmma of bfloat16, nor of a transposed operand
        score = _plainly(q_tile[...], k_tile[...], 1)
        hand_over()
        return score

    def multiply(acc_ref):
        plgpu.wgmma(acc_ref, q_tile, plgpu.transpose_ref(k_tile, (1, 0)))
        hand_over()
        return acc_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _summed(acc: jax.Array, weight: jax.Array, v_tile, interpret: bool) -> jax.Array:
    """acc + weight v, in place."""
    if interpret:
        return acc + _plainly(weight, v_tile[...], 0)
    return pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, weight, v_tile))(plgpu.ACC.init(acc))


def _plainly(a: jax.Array, b: jax.Array, contracted: int) -> jax.Array:
    return lax.dot_general(a, b, (((1,), (contracted,)), ((), ())), preferred_element_type=jnp.float32)
