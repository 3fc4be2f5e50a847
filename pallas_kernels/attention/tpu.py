"""Sparse attention on TPUs, as Pallas kernels for Mosaic: what is supported, how operands are laid out, and the two passes as
one differentiable function. The passes are in `tpu_forward` and `tpu_backward`.

Keys that are not finite cost the kernels nothing. Outside of them k and v are freed of what is not finite; then the forward
pass is given keys that are NaN wherever key or value was not finite. A score that is not seen is replaced, NaN or not, and one
that is seen spoils its row. The backward pass is given the finite keys: a spoilt row has lse NaN there.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.attention import tpu_common as common
from pallas_kernels.attention.block_mask import SelectedBlocks, as_block_mask, block_lists, inner, own_blocks
from pallas_kernels.attention.blocks import block_sizes
from pallas_kernels.attention.derivatives import in_words, once, reverse_only
from pallas_kernels.attention.lists import BlockLists, Segments, Sizes, transposed
from pallas_kernels.attention.score_mod import refuse_arrays
from pallas_kernels.attention.tpu_backward import backward
from pallas_kernels.attention.tpu_common import LANES, Call
from pallas_kernels.attention.tpu_forward import forward

MOST_SCALARS = 1 << 17  # words of lists in scalar memory
FOLDED = 128  # a group's queries are folded together where so many rows hold them all


class Passes(NamedTuple):
    """Of both passes: packed lists, and their static facts."""

    forward: Any
    backward: Any


def attend(q, k, v, mask, *, q_offset, score_mod, segment_ids, sinks, softcap, scale, interpret: Any = False):
    """(out [batch, q_len, q_heads, d_v], lse float32 [batch, q_len, q_heads]). Arguments: see `sparse_attention`.

    interpret: pltpu.InterpretParams to run the kernels on a CPU. Raises NotImplementedError for what it does not support.
    """
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"q: tpu computes in float32 and bfloat16, got {q.dtype}")
    refuse_arrays(score_mod, "tpu")
    b, t, h, _ = q.shape
    kv_heads, d_v = v.shape[2:]
    if scale <= 0:  # scores are compared before they are scaled
        q, scale = (-q, -scale) if scale else (q * 0, 1.0)
    sizes = _sizes(mask, q, k, v, interpret)
    if not interpret:
        dispatch.check_platform("tpu")
    lists, layouts, looked_up, fold = _lists(mask, sizes, q, kv_heads, q_offset, segment_ids)
    call = Call(
        batch=b, heads=h // fold, kv_heads=kv_heads, fold=fold, forward=sizes.forward, backward=sizes.backward,
        mask=None if looked_up else inner(mask), score_mod=score_mod, softcap=softcap, scale=scale,
        segments=segment_ids is not None, interpret=interpret,
    )  # fmt: skip
    offset = jnp.reshape(jnp.asarray(q_offset, jnp.int32), (-1,))
    k, v = (_lanes(x).swapaxes(1, 2) for x in (k, v))
    finite = jnp.isfinite(k).all(-1, keepdims=True) & jnp.isfinite(v).all(-1, keepdims=True)
    k, v = (jnp.where(jnp.isfinite(x), x, 0) for x in (k, v))
    spoilt = jnp.where(finite, 0, jnp.nan).astype(k.dtype)
    q, k, v, spoilt, sinks = reverse_only("tpu", (q, k, v, spoilt, sinks))
    folded = _lanes(q).reshape(b, t, h // fold, fold, -1).swapaxes(1, 2).reshape(b, h // fold, t * fold, -1)
    with in_words("tpu"):
        out, lse = _attention(call, layouts, folded, k, v, spoilt, sinks, lists, offset, segment_ids)
    out = out.reshape(b, h // fold, t, fold, -1)[..., :d_v].swapaxes(1, 2).reshape(b, t, h, -1)
    return out, lse.reshape(b, h // fold, t, fold).swapaxes(1, 2).reshape(b, t, h)


def _lanes(x: Any) -> Any:
    """Head dimension padded to whole lanes."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % LANES)])


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _sizes(mask: Any, q, k, v, interpret: Any) -> Passes:
    t, s = q.shape[1], k.shape[1]
    own = own_blocks(mask)
    if own is None:
        most = max(q.shape[-1], v.shape[-1])
        cut = [
            Sizes(t, s, min(blocks.q, _up(t, 16)), min(blocks.kv, _up(s, LANES)))
            for blocks in block_sizes("tpu", dispatch.device_kind(), t, most)
        ]
        return Passes(*cut)
    if not interpret and (own.q % 16 or own.kv % LANES):
        raise NotImplementedError(
            f"mask: tpu has blocks of a multiple of 16 queries x a multiple of {LANES} keys, got {own.q} x {own.kv}"
        )
    return Passes(*(Sizes(t, s, *own),) * 2)


def _lists(mask: Any, sizes: Passes, q, kv_heads: int, q_offset: Any, segments: Segments | None):
    """(packed lists, their layouts, whether the mask is looked up in patterns, fold)."""
    b, t, h, _ = q.shape
    static = isinstance(q_offset, int) and segments is None and not isinstance(mask, SelectedBlocks)
    looked_up = not inner(mask).analytic
    if looked_up and not static:
        why = "q_offset" if not isinstance(q_offset, int) else "segment_ids" if segments is not None else "mask"
        raise NotImplementedError(
            f"{why}: tpu looks up a mask that is no index arithmetic in the blocks known beforehand, and these depend on data"
        )
    group = h // kv_heads
    made: dict[Sizes, BlockLists] = {}
    packed, layouts = [], []
    for by_key, cut in enumerate(sizes):
        if max(cut.rows, cut.columns) > common.MOST_BLOCKS:
            raise NotImplementedError(
                f"mask: tpu has up to {common.MOST_BLOCKS} blocks along an axis, got {cut.rows} x {cut.columns}"
            )
        if cut not in made:
            made[cut] = block_lists(mask, cut, b, h, q_offset, segments)
        lists = made[cut]
        if by_key:
            lists = transposed(lists, cut.columns)
        which = patterns = None
        if looked_up:
            patterns, which = common.looked_up(as_block_mask(mask, cut, q_offset, h, b), lists, bool(by_key))
        if group > 1 and lists.row.shape[1] == h and _grouped(mask, lists, which, group):
            lists = BlockLists(*(x[:, ::group] for x in lists))
            which = None if which is None else which[:, ::group]
        one, layout = common.pack(lists, which, patterns)
        words = one.words.size * (2 if looked_up else 1)
        if words > MOST_SCALARS:
            raise NotImplementedError(
                f"mask: tpu keeps the lists of blocks in scalar memory, up to {MOST_SCALARS} words; "
                f"got {words} for {layout.batch} x {layout.heads} lists of {layout.n}"
            )
        packed.append(one)
        layouts.append(layout)
    folds = group > 1 and not looked_up and max(layout.heads for layout in layouts) <= kv_heads
    fold = group if folds and t * group <= FOLDED and all(cut.rows == 1 for cut in sizes) else 1
    return Passes(*packed), Passes(*layouts), looked_up, fold


def _grouped(mask: Any, lists: BlockLists, which: Any, group: int) -> bool:
    """Whether the heads of a group share lists."""
    if isinstance(mask, SelectedBlocks):
        return mask.mask.heads == 0 and mask.index.shape[1] * group == lists.row.shape[1]
    parts = [x for x in (*lists, which) if x is not None]
    if any(isinstance(x, jax.Array) for x in parts):
        return False
    return all((x.reshape(x.shape[0], -1, group, x.shape[-1]) == x[:, ::group, None]).all() for x in parts)


def _padded(x: Any, axis: int, length: int, value: Any = 0) -> Any:
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, pad, constant_values=value) if length > x.shape[axis] else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(call: Call, layouts: Passes, q, k, v, spoilt, sinks, lists: Passes, offset, segments):
    """(out [batch, heads, length, d_v], lse float32 [batch, heads, length]) for heads of the kernel."""
    sizes = call.forward
    rows, t = sizes.q_block * call.fold, q.shape[2]
    if segments is not None:
        kv_ids = _padded(segments.kv, 1, sizes.columns * sizes.kv_block)
        kv_ids = kv_ids.reshape(call.batch, sizes.columns, 1, sizes.kv_block)
        segments = _padded(jnp.repeat(segments.q, call.fold, axis=1), 1, sizes.rows * rows), kv_ids
    if sinks is not None:
        tiled = jnp.tile(sinks.astype(jnp.float32).reshape(call.heads, call.fold), (1, sizes.q_block))
    out, lse = common.mapped(functools.partial(forward, call, layouts.forward))(
        _padded(q, 2, sizes.rows * rows), *(_padded(x, 2, sizes.columns * sizes.kv_block) for x in
        (k + spoilt, v)), lists.forward, offset, segments, None if sinks is None else tiled,
    )  # fmt: skip
    return out[:, :, :t], lse.reshape(*lse.shape[:2], -1)[:, :, :t]


def _attention_forward(call: Call, layouts: Passes, q, k, v, spoilt, sinks, lists, offset, segments):
    q, k, v, spoilt, sinks = once("tpu", (q, k, v, spoilt, sinks))
    out, lse = _attention(call, layouts, q, k, v, spoilt, sinks, lists, offset, segments)
    return (out, lse), (q, k, v, sinks, lists.backward, offset, segments, out, lse)


def _attention_backward(call: Call, layouts: Passes, residuals, cotangents):
    q, k, v, sinks, lists, offset, segments, out, lse = residuals
    do, dlse = cotangents
    sizes = call.backward
    rows = sizes.q_block * call.fold
    q_rows, kv_rows = sizes.rows * rows, sizes.columns * sizes.kv_block
    # ds = p (dp - (rowsum(do * out) - dlse)). Where lse is NaN, p is NaN for the keys seen and 0 for others; those must get 0,
    # so that the factor cannot be NaN too.
    delta = jnp.sum(do.astype(jnp.float32) * out.astype(jnp.float32), -1) - dlse
    nothing = lse == -jnp.inf
    # no weight for queries that see nothing, nor for the rows of padding
    facts = jnp.stack([jnp.where(nothing, jnp.inf, lse * common.LOG2E), jnp.where(nothing | jnp.isnan(lse), 0, delta)], 2)
    facts = jnp.concatenate([_padded(facts[:, :, :1], 3, q_rows, jnp.inf), _padded(facts[:, :, 1:], 3, q_rows)], 2)
    facts = facts.reshape(*facts.shape[:3], sizes.rows, rows).swapaxes(2, 3)
    ids = segments
    if segments is not None:
        q_ids = _padded(jnp.repeat(segments.q, call.fold, axis=1), 1, q_rows).reshape(call.batch, sizes.rows, 1, rows)
        ids = q_ids, _padded(segments.kv, 1, kv_rows)
    dq, dk, dv = common.mapped(functools.partial(backward, call, layouts.backward))(
        _padded(q, 2, q_rows), _padded(k, 2, kv_rows), _padded(v, 2, kv_rows), lists, offset, ids,
        _padded(do, 2, q_rows), facts,
    )  # fmt: skip
    dk, dv = (x.reshape(*k.shape[:2], -1, *x.shape[2:]).sum(2)[:, :, : k.shape[2]] for x in (dk, dv))
    dsinks = None
    if sinks is not None:
        weight = jnp.where(nothing, 0, jnp.exp(_by_row(call, sinks.astype(jnp.float32), lse) - lse))
        dsinks = -(weight * delta).reshape(*delta.shape[:2], -1, call.fold).sum((0, 2)).reshape(-1).astype(sinks.dtype)
    return (
        (dq[:, :, : q.shape[2]] * call.scale).astype(q.dtype), (dk * call.scale).astype(k.dtype), dv.astype(v.dtype),
        jnp.zeros((*k.shape[:3], 1), k.dtype), dsinks, None, None, None,
    )  # fmt: skip


def _by_row(call: Call, sinks: Any, rows: Any) -> Any:
    """[heads, fold] -> [1, heads, length], as the rows of a head are folded."""
    return jnp.tile(sinks.reshape(1, call.heads, call.fold), (1, 1, rows.shape[2] // call.fold))


_attention.defvjp(_attention_forward, _attention_backward)
