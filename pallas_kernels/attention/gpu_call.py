"""What all kernels for GPUs share: from a call like that of `reference.attend` to padded arrays and lists; the derivative."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.attention.algebra import Mask
from pallas_kernels.attention.blocks import Blocks
from pallas_kernels.attention.derivatives import in_words, once, reverse_only
from pallas_kernels.attention.gpu_lists import Blocked, Visits, blocked, visits
from pallas_kernels.attention.lists import Sizes
from pallas_kernels.attention.score_mod import refuse_arrays

LEAST = 16  # rows and columns of a tile, which tensor cores ask for


class Spec(NamedTuple):
    """What a kernel is specialised to."""

    mask: Mask | None  # None: bitmaps
    q_len: int
    kv_len: int
    q_offset: int | None  # None: data
    forward: Blocks  # of the lists
    backward: Blocks
    score_mod: Callable[..., jax.Array] | None
    softcap: float | None
    scale: float
    interpret: Any
    forward_pass: Callable[..., Any]  # (spec, q, k, v, sinks, data) -> (out, lse)
    backward_pass: Callable[..., Any]  # (spec, q, k, v, sinks, data, out, lse, d_out, d_lse) -> (dq, dk, dv, dsinks)


class Lists(NamedTuple):
    """What the kernels of one pass go by."""

    rows: Visits
    columns: Visits | None  # of the backward pass
    patterns: Any


class Data(NamedTuple):
    """What is not differentiated."""

    forward: Lists
    backward: Lists
    q_offset: Any  # int32 [1 or batch], or None
    segments: Any  # int32 ([batch, q_len], [batch, kv_len]), padded to whole blocks; or None


def attend(passes, blocks, q, k, v, mask, *, q_offset, score_mod, segment_ids, sinks, softcap, scale, interpret):
    """As `reference.attend`, through `passes`, (forward, backward), with lists of `blocks`, (forward, backward)."""
    b, t, h, _ = q.shape
    s = k.shape[1]
    forward, backward = blocks
    if not interpret:
        dispatch.check_platform("gpu")
    refuse_arrays(score_mod, "gpu")
    q_p, k_p, v_p = (_padded(x, blocks, side) for x, side in ((q, 0), (k, 1), (v, 1)))
    lists, kept = {}, {}
    for each in dict.fromkeys(blocks):
        sizes = Sizes(t, s, *each)
        kept[each] = blocked(mask, sizes, b, h, q_offset, segment_ids)
        lists[each] = _lists(kept[each], sizes)
    segments = None
    if segment_ids is not None:
        segments = (_padded(segment_ids.q, blocks, 0), _padded(segment_ids.kv, blocks, 1))
    static = isinstance(q_offset, int)
    offset = None if static else jnp.reshape(jnp.asarray(q_offset, jnp.int32), (-1,))
    data = Data(lists[forward], lists[backward], offset, segments)
    spec = Spec(
        kept[forward].mask, t, s, q_offset if static else None, forward, backward, score_mod, softcap, scale, interpret, *passes
    )
    sinks = None if sinks is None else sinks.astype(jnp.float32)
    q_p, k_p, v_p, sinks = reverse_only("gpu", (q_p, k_p, v_p, sinks))
    with in_words("gpu"):
        out, lse = _attention(spec, q_p, k_p, v_p, sinks, data)
    return out[:, :t, :, : v.shape[3]], lse[:, :, :t].swapaxes(1, 2)


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _padded(x: jax.Array, blocks: tuple[Blocks, Blocks], side: int) -> jax.Array:
    """[batch, length, ...] to whole blocks of both passes, heads to a power of two; no copy where it is so already."""
    whole = math.lcm(*(each[side] for each in blocks))
    short = [(0, 0), (0, -x.shape[1] % whole)]
    if x.ndim == 4:
        short += [(0, 0), (0, max(power_of_two(x.shape[3]), LEAST) - x.shape[3])]
    return jnp.pad(x, short) if any(most for _, most in short) else x


def _lists(kept: Blocked, sizes: Sizes) -> Lists:
    rows = visits(kept.lists, kept.which, "row", sizes.rows)
    return Lists(rows, visits(kept.lists, kept.which, "column", sizes.columns), kept.patterns)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(spec: Spec, q, k, v, sinks, data: Data):
    return spec.forward_pass(spec, q, k, v, sinks, data)


def _attention_forward(spec: Spec, q, k, v, sinks, data: Data):
    q, k, v, sinks = once("gpu", (q, k, v, sinks))
    out, lse = spec.forward_pass(spec, q, k, v, sinks, data)
    return (out, lse), (q, k, v, sinks, data, out, lse)


def _attention_backward(spec: Spec, kept, cotangents):
    q, k, v, sinks, data, out, lse = kept
    dq, dk, dv, dsinks = spec.backward_pass(spec, q, k, v, sinks, data, out, lse, *cotangents)
    return dq, dk, dv, dsinks, None


_attention.defvjp(_attention_forward, _attention_backward)


def like(x: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Of an output that varies over the mesh axes that x varies over (under `shard_map`)."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)
