"""Block-sparse attention for GPUs that Triton compiles for: FlashAttention-2 (Dao 2023, arXiv 2307.08691) over block lists.

Forward: a program for each tile of queries goes through the FULL, then the PARTIAL blocks of its row, with the running
maximum and sum of exponentials of the online softmax. Backward: scores are computed again, once by key blocks (dk and dv; the
query heads of a group one after the other, so that nothing is added atomically and every call gives the same bits), once by
query blocks (dq).

A block of the lists is cut into tiles that fit the registers, so lists may be coarser than tiles. Exponentials are of 2.

Keys that are not finite: all queries of a FULL block see them, so that it is enough that what they make stays not finite: an
infinite score becomes NaN, and what was accumulated is looked at in the end. PARTIAL blocks alone pay for unseen keys.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.attention import gpu_call
from pallas_kernels.attention.block_mask import own_blocks
from pallas_kernels.attention.blocks import Blocks, block_sizes
from pallas_kernels.attention.gpu_call import LEAST, Data, Lists, Spec, like
from pallas_kernels.attention.gpu_lists import Visits

LOG2E = math.log2(math.e)


class Tuning(NamedTuple):
    """The tiles of a kernel and how Triton compiles it."""

    q: int
    kv: int
    warps: int
    stages: int


TUNING = {  # bytes of an element, head dimension up to -> kernel -> queries, keys, warps, stages
    (2, 64): {"forward": (64, 64, 4, 3), "dkv": (32, 64, 8, 2), "dq": (64, 64, 8, 3)},
    (2, 128): {"forward": (64, 64, 8, 2), "dkv": (32, 64, 8, 3), "dq": (64, 64, 8, 2)},
    (2, 256): {"forward": (64, 32, 8, 2), "dkv": (32, 32, 8, 2), "dq": (32, 64, 8, 2)},
    (4, 32): {"forward": (64, 32, 8, 2), "dkv": (16, 32, 8, 1), "dq": (64, 32, 8, 2)},
    (4, 64): {"forward": (32, 32, 4, 2), "dkv": (32, 32, 8, 2), "dq": (32, 64, 8, 2)},
    (4, 128): {"forward": (32, 16, 4, 1), "dkv": (32, 16, 8, 1), "dq": (16, 16, 8, 1)},
}


def tuning(kernel: Literal["forward", "dkv", "dq"], blocks: Blocks, q: jax.Array, v: jax.Array) -> Tuning:
    """The largest tiles of those tried with which ptxas reports no spills for A100, H100 and B200, in a call with all features,
    and which fit an A100's shared memory. Which are the fastest is not known: no GPU was there."""
    d, size = max(q.shape[3], v.shape[3]), q.dtype.itemsize
    rows = [row for (of, most), row in TUNING.items() if of == size and d <= most]
    if not rows:
        most = max(most for of, most in TUNING if of == size)
        raise NotImplementedError(f"q: {q.dtype} has head dimensions up to {most}, got {d}")
    q_tile, kv_tile, warps, stages = rows[0][kernel]
    return Tuning(_tile("q", blocks.q, q_tile), _tile("kv", blocks.kv, kv_tile), warps, stages)


def _tile(name: str, block: int, most: int) -> int:
    """The largest power of two that divides the block, up to `most`."""
    tile = min(block & -block, most)
    if tile < LEAST:
        raise NotImplementedError(f"mask: blocks of {block} ({name}), wanted a multiple of {LEAST}")
    return tile


def attend(q, k, v, mask, *, q_offset, score_mod, segment_ids, sinks, softcap, scale, interpret=False):
    """As `reference.attend`."""
    blocks = check(q, v, mask)
    return gpu_call.attend(
        (forward, backward), blocks, q, k, v, mask, q_offset=q_offset, score_mod=score_mod, segment_ids=segment_ids,
        sinks=sinks, softcap=softcap, scale=scale, interpret=interpret,
    )  # fmt: skip


def check(q: jax.Array, v: jax.Array, mask: Any) -> tuple[Blocks, Blocks]:
    """The blocks of the lists of both passes. Raises NotImplementedError where the kernels cannot be had."""
    if q.dtype == jnp.float64:
        raise NotImplementedError("q: float64")
    own = own_blocks(mask)
    blocks = (own, own) if own else block_sizes("gpu", "*", q.shape[1], max(q.shape[3], v.shape[3]))
    for kernel, each in (("forward", blocks[0]), ("dkv", blocks[1]), ("dq", blocks[1])):
        tuning(kernel, each, q, v)
    return blocks


# ---- what all three kernels do to scores


def _dot(spec: Spec, a: jax.Array, b: jax.Array) -> jax.Array:
    """a b, summed in float32. float32 operands go through the tensor cores in three passes (tf32 alone has 10 bits)."""
    precision: Any = None
    if a.dtype == jnp.float32:
        precision = lax.Precision.HIGHEST if spec.interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _finite(x: jax.Array) -> jax.Array:
    return jnp.abs(x.astype(jnp.float32)) < jnp.inf


def _cleaned(x: jax.Array) -> jax.Array:
    return jnp.where(_finite(x), x, jnp.zeros_like(x))


def _bent(spec: Spec, b, h, q_index, kv_index) -> Callable[[jax.Array], jax.Array] | None:
    """What is done to scaled scores; None if nothing is."""
    if spec.softcap is None and spec.score_mod is None:
        return None

    def bend(score: jax.Array) -> jax.Array:
        if spec.softcap is not None:
            score = spec.softcap * jnp.tanh(score / spec.softcap)
        if spec.score_mod is not None:
            score = jnp.broadcast_to(spec.score_mod(score, b, h, q_index, kv_index), score.shape).astype(jnp.float32)
        return score

    return bend


class _Reader:
    """Reads one (sequence, head)'s lists, bitmaps and segments inside a kernel."""

    def __init__(self, spec: Spec, visits: Visits, patterns: Any, offset: Any, segments: Any, blocks: Blocks, tiles: Tuning):
        self.spec, self.visits, self.patterns, self.segments = spec, visits, patterns, segments
        self.offset, self.blocks, self.tiles = offset, blocks, tiles

    def of(self, ref: Any, b: Any, h: Any) -> tuple[Any, Any]:
        return (b if ref.shape[0] > 1 else 0), (h if ref.shape[1] > 1 else 0)

    def ends(self, b: Any, h: Any, major: Any) -> tuple[Any, Any, Any]:
        at = self.of(self.visits.ends, b, h)
        first, partial, end = (self.visits.ends[(*at, 2 * major + i)] for i in range(3))
        return first, partial, end

    def other(self, b: Any, h: Any, entry: Any) -> Any:
        return self.visits.other[(*self.of(self.visits.other, b, h), entry)]

    def position(self, b: Any, q_index: jax.Array) -> jax.Array:
        if self.offset is None:
            return q_index + self.spec.q_offset if self.spec.q_offset else q_index
        return q_index + self.offset[b if self.offset.shape[0] > 1 else 0]

    def seen(self, b: Any, h: Any, entry: Any, q_first: Any, kv_first: Any, q_position: Any, kv_index: Any) -> jax.Array:
        """bool: which pairs of a tile of a PARTIAL block are seen. [q, kv] if q_position is [q, 1] and kv_index [1, kv];
        [kv, q] if they are [1, q] and [kv, 1]."""
        turned, tiles = q_position.shape[0] == 1, self.tiles
        if self.patterns is None:
            assert self.spec.mask is not None
            seen = self.spec.mask(b, h, q_position, kv_index)
        else:
            which = self.visits.pattern[(*self.of(self.visits.pattern, b, h), entry)]
            inside = (_split(first, block)[1] for first, block in zip((q_first, kv_first), self.blocks))
            bitmap = self.patterns[which, *(pl.ds(start, tile) for start, tile in zip(inside, tiles))]
            seen = (bitmap.T if turned else bitmap) != 0
        if self.spec.kv_len % self.blocks.kv:
            seen = seen & (kv_index < self.spec.kv_len)
        if self.segments is not None:
            q_ids = self.segments[0][b, pl.ds(q_first, tiles.q)]
            kv_ids = self.segments[1][b, pl.ds(kv_first, tiles.kv)]
            seen = seen & (q_ids[None] == kv_ids[:, None] if turned else q_ids[:, None] == kv_ids[None])
        return seen


def _each_tile(first: Any, end: Any, parts: int, body: Callable[[Any, Any, Any], Any], carry: Any) -> Any:
    """body(entry, which part of its block, carry) for every tile of entries first to end."""

    def step(i, carry):
        return body(*_split(i, parts), carry)

    return lax.fori_loop(first * parts, end * parts, step, carry)


def _split(i: Any, parts: int) -> tuple[Any, Any]:
    """(i // parts, i % parts) of i >= 0."""
    return (i, 0) if parts == 1 else (lax.div(i, jnp.int32(parts)), lax.rem(i, jnp.int32(parts)))


def _start(major: Any, block: int, part: Any, tile: int) -> Any:
    return pl.multiple_of(major * block + part * tile, tile)


# ---- forward


def _forward_kernel(spec: Spec, tiles: Tuning, groups: int, q_ref, k_ref, v_ref, sinks_ref, lists, offset_ref, segment_refs,
                    out_ref, lse_ref):  # fmt: skip
    """Refs are whole arrays: q [B, T, H, D], k [B, S, KV, D], v [B, S, KV, Dv], out [B, T, H, Dv], lse [B, H, T]."""
    blocks = spec.forward
    read = _Reader(spec, lists.rows, lists.patterns, offset_ref, segment_refs, blocks, tiles)
    # The last rows first: under a causal mask they are the longest, and the short ones then fill the end.
    tile, h, b = pl.num_programs(0) - 1 - pl.program_id(0), pl.program_id(1), pl.program_id(2)
    q_parts, kv_parts = blocks.q // tiles.q, blocks.kv // tiles.kv
    row, _ = _split(tile, q_parts)
    q_first, g = pl.multiple_of(tile * tiles.q, tiles.q), _split(h, groups)[0]
    q = q_ref[b, pl.ds(q_first, tiles.q), h, :]
    q_position = read.position(b, q_first + jnp.arange(tiles.q)[:, None])
    d_v = v_ref.shape[3]
    plain = spec.softcap is None and spec.score_mod is None and spec.scale > 0
    factor = spec.scale * LOG2E if plain else 1.0  # kept out of the scores where it can enter the exponent

    def body(entry, part, carry, partial):
        acc, top, total = carry
        column = read.other(b, h, entry)
        kv_first = _start(column, blocks.kv, part, tiles.kv)
        k = k_ref[b, pl.ds(kv_first, tiles.kv), g, :]
        score = _dot(spec, q, k.T)
        score = score + 0 * score  # infinite, which is a key's fault, becomes NaN
        kv_index = kv_first + jnp.arange(tiles.kv)[None]
        if not plain:
            score = score * spec.scale
            bend = _bent(spec, b, h, q_position, kv_index)
            score = (score if bend is None else bend(score)) * LOG2E
        v = v_ref[b, pl.ds(kv_first, tiles.kv), g, :]
        if partial:
            seen = read.seen(b, h, entry, q_first, kv_first, q_position, kv_index)
            spoilt = jnp.max(jnp.where(_finite(v), 0.0, 1.0), axis=1)[None] > 0
            score = jnp.where(seen, jnp.where(spoilt, jnp.nan, score), -jnp.inf)
            v = _cleaned(v)
        high = jnp.maximum(top, jnp.max(score, axis=1) * factor)
        base = jnp.where(high == -jnp.inf, 0.0, high)
        weight = jnp.exp2(score * factor - base[:, None])
        shrink = jnp.exp2(top - base)
        acc = acc * shrink[:, None] + _dot(spec, weight.astype(v.dtype), v)
        return acc, high, total * shrink + jnp.sum(weight, axis=1)

    top = jnp.full((tiles.q,), -jnp.inf, jnp.float32)
    total = jnp.zeros((tiles.q,), jnp.float32)
    if sinks_ref is not None:
        top = jnp.zeros_like(top) + sinks_ref[h] * LOG2E
        total = jnp.where(top == -jnp.inf, 0.0, 1.0)
    carry = (jnp.zeros((tiles.q, d_v), jnp.float32), top, total)
    first, partials, end = read.ends(b, h, row)
    carry = _each_tile(first, partials, kv_parts, functools.partial(body, partial=False), carry)
    acc, top, total = _each_tile(partials, end, kv_parts, functools.partial(body, partial=True), carry)
    total = jnp.where(jnp.max(jnp.where(_finite(acc), 0.0, 1.0), axis=1) > 0, jnp.nan, total)
    none = total == 0
    out = acc / jnp.where(none, 1.0, total)[:, None]
    out_ref[b, pl.ds(q_first, tiles.q), h, :] = out.astype(out_ref.dtype)
    lse_ref[b, h, pl.ds(q_first, tiles.q)] = jnp.where(none, -jnp.inf, top / LOG2E + jnp.log(jnp.where(none, 1.0, total)))


def forward(spec: Spec, q, k, v, sinks, data: Data):
    b, t, h, _ = q.shape
    tiles = tuning("forward", spec.forward, q, v)
    return pl.pallas_call(
        functools.partial(_forward_kernel, spec, tiles, h // k.shape[2]),
        grid=(-(-spec.q_len // spec.forward.q) * (spec.forward.q // tiles.q), h, b),
        out_shape=(like(q, (b, t, h, v.shape[3]), q.dtype), like(q, (b, h, t), jnp.float32)),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=bool(spec.interpret),
        name="sparse_attention_forward",
    )(q, k, v, sinks, _arrays(data.forward._replace(columns=None)), data.q_offset, data.segments)


def _arrays(lists: Lists) -> Lists:
    return jax.tree.map(jnp.asarray, lists)


# ---- backward


def _weights(spec: Spec, score: jax.Array, lse2: jax.Array, d_weight: jax.Array, delta: jax.Array,
             bend: Callable[[jax.Array], jax.Array] | None, seen: jax.Array | None):  # fmt: skip
    """(weight, gradient of q k') from q k', the log2-sum-exp, do v' and delta = rowsum(do * out) - dlse."""
    if bend is None:
        score, back = score * (spec.scale * LOG2E), None
    else:
        score, back = jax.vjp(bend, score * spec.scale)
        score = score * LOG2E
    weight = jnp.exp2(score - lse2)
    if seen is not None:
        weight = jnp.where(seen, weight, 0.0)
    d_score = weight * (d_weight - delta)
    if back is not None:
        (d_score,) = back(d_score)
    if seen is not None:
        d_score = jnp.where(seen, d_score, 0.0)
    return weight, d_score


def _dkv_kernel(spec: Spec, tiles: Tuning, groups: int, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, lists, offset_ref,
                segment_refs, dk_ref, dv_ref):  # fmt: skip
    """do [B, T, H, Dv]; lse (in powers of 2), delta [B, H, T]; dk, dv as k, v. Scores are turned: [kv, q]."""
    blocks = spec.backward
    read = _Reader(spec, lists.columns, lists.patterns, offset_ref, segment_refs, blocks, tiles)
    tile, g, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    q_parts, kv_parts = blocks.q // tiles.q, blocks.kv // tiles.kv
    column, _ = _split(tile, kv_parts)
    kv_first = pl.multiple_of(tile * tiles.kv, tiles.kv)
    k_raw, v_raw = (ref[b, pl.ds(kv_first, tiles.kv), g, :] for ref in (k_ref, v_ref))
    # Queries that see a key which is not finite have a NaN for their log-sum-exp, so that here it can be cleaned once.
    k, v = _cleaned(k_raw), _cleaned(v_raw)
    kv_index = kv_first + jnp.arange(tiles.kv)[:, None]

    def of_head(i, carry):
        h = g * groups + i

        def body(entry, part, carry, partial):
            dk, dv = carry
            row = read.other(b, h, entry)
            q_first = _start(row, blocks.q, part, tiles.q)
            q, do = (ref[b, pl.ds(q_first, tiles.q), h, :] for ref in (q_ref, do_ref))
            lse2, delta = (ref[b, h, pl.ds(q_first, tiles.q)][None] for ref in (lse_ref, delta_ref))
            q_position = read.position(b, q_first + jnp.arange(tiles.q)[None])
            seen = None
            if partial:
                seen = read.seen(b, h, entry, q_first, kv_first, q_position, kv_index)
            bend = _bent(spec, b, h, q_position, kv_index)
            weight, d_score = _weights(spec, _dot(spec, k, q.T), lse2, _dot(spec, v, do.T), delta, bend, seen)
            return dk + _dot(spec, d_score.astype(q.dtype), q), dv + _dot(spec, weight.astype(do.dtype), do)

        first, partials, end = read.ends(b, h, column)
        carry = _each_tile(first, partials, q_parts, functools.partial(body, partial=False), carry)
        return _each_tile(partials, end, q_parts, functools.partial(body, partial=True), carry)

    carry = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    dk, dv = of_head(0, carry) if groups == 1 else lax.fori_loop(0, groups, of_head, carry)
    for ref, raw, gradient in ((dk_ref, k_raw, dk * spec.scale), (dv_ref, v_raw, dv)):
        ref[b, pl.ds(kv_first, tiles.kv), g, :] = jnp.where(_finite(raw), gradient, 0.0).astype(ref.dtype)


def _dq_kernel(spec: Spec, tiles: Tuning, groups: int, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, lists, offset_ref,
               segment_refs, dq_ref):  # fmt: skip
    blocks = spec.backward
    read = _Reader(spec, lists.rows, lists.patterns, offset_ref, segment_refs, blocks, tiles)
    tile, h, b = pl.num_programs(0) - 1 - pl.program_id(0), pl.program_id(1), pl.program_id(2)
    q_parts, kv_parts = blocks.q // tiles.q, blocks.kv // tiles.kv
    row, _ = _split(tile, q_parts)
    q_first, g = pl.multiple_of(tile * tiles.q, tiles.q), _split(h, groups)[0]
    q, do = (ref[b, pl.ds(q_first, tiles.q), h, :] for ref in (q_ref, do_ref))
    lse2, delta = (ref[b, h, pl.ds(q_first, tiles.q)][:, None] for ref in (lse_ref, delta_ref))
    q_position = read.position(b, q_first + jnp.arange(tiles.q)[:, None])

    def body(entry, part, dq, partial):
        kv_first = _start(read.other(b, h, entry), blocks.kv, part, tiles.kv)
        k, v = (ref[b, pl.ds(kv_first, tiles.kv), g, :] for ref in (k_ref, v_ref))
        kv_index = kv_first + jnp.arange(tiles.kv)[None]
        seen = None
        if partial:
            k, v = _cleaned(k), _cleaned(v)
            seen = read.seen(b, h, entry, q_first, kv_first, q_position, kv_index)
        bend = _bent(spec, b, h, q_position, kv_index)
        _, d_score = _weights(spec, _dot(spec, q, k.T), lse2, _dot(spec, do, v.T), delta, bend, seen)
        return dq + _dot(spec, d_score.astype(k.dtype), k)

    first, partials, end = read.ends(b, h, row)
    dq = jnp.zeros(q.shape, jnp.float32)
    dq = _each_tile(first, partials, kv_parts, functools.partial(body, partial=False), dq)
    dq = _each_tile(partials, end, kv_parts, functools.partial(body, partial=True), dq)
    dq_ref[b, pl.ds(q_first, tiles.q), h, :] = (dq * spec.scale).astype(dq_ref.dtype)


def backward(spec: Spec, q, k, v, sinks, data: Data, out, lse, d_out, d_lse):
    """(dq, dk, dv, dsinks) of padded arrays: q [B, T, H, D], lse and d_lse [B, H, T]."""
    b, t, h, _ = q.shape
    kv_heads = k.shape[2]
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1).swapaxes(1, 2) - d_lse
    # Queries that see nothing, and those beyond the last (of which nothing may have been written), get weights of 0 by an
    # infinite log-sum-exp.
    nothing = (lse == -jnp.inf) | (jnp.arange(t)[None, None] >= spec.q_len)
    delta, lse2 = jnp.where(nothing, 0, delta), jnp.where(nothing, jnp.inf, lse * LOG2E)
    lists = _arrays(data.backward)
    arguments = (q, k, v, d_out, lse2, delta)
    tiles = tuning("dkv", spec.backward, q, v)
    dk, dv = pl.pallas_call(
        functools.partial(_dkv_kernel, spec, tiles, h // kv_heads),
        grid=(-(-spec.kv_len // spec.backward.kv) * (spec.backward.kv // tiles.kv), kv_heads, b),
        out_shape=(like(q, k.shape, k.dtype), like(q, v.shape, v.dtype)),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=bool(spec.interpret),
        name="sparse_attention_dkv",
    )(*arguments, lists._replace(rows=None), data.q_offset, data.segments)
    tiles = tuning("dq", spec.backward, q, v)
    dq = pl.pallas_call(
        functools.partial(_dq_kernel, spec, tiles, h // kv_heads),
        grid=(-(-spec.q_len // spec.backward.q) * (spec.backward.q // tiles.q), h, b),
        out_shape=like(q, q.shape, q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=bool(spec.interpret),
        name="sparse_attention_dq",
    )(*arguments, lists._replace(columns=None), data.q_offset, data.segments)
    if sinks is None:
        return dq, dk, dv, None
    share = jnp.where(nothing, 0, jnp.exp(sinks[None, :, None] - lse))
    return dq, dk, dv, -jnp.sum(share * delta, axis=(0, 2))
