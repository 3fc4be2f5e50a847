"""Attention over a sequence that is cut over devices: the keys go round in a ring (Liu, Zaharia and Abbeel 2023, arXiv
2310.01889, section 3).

A device keeps its queries. At every step the next keys and values are on their way to it while it attends to those at hand;
what it gets from them is put together by their log-sum-exp, as blocks are within a device (Dao et al. 2022, arXiv 2205.14135,
section 3.1). With out_i and lse_i of the keys at step i, and w_i = exp(lse_i - lse):

    lse = log(sum of exp(lse_i));  out = sum of w_i out_i
    d out_i = w_i d out;  d lse_i = w_i (d out (out_i - out) + d lse)

Backward, keys and values go round once more, and with them the gradients that they have gathered, so that a device keeps only
what is of its own queries and keys: memory falls as 1 / devices. What a step gives is computed again and differentiated by
`jax.vjp` of the very call, so that every implementation of `sparse_attention` serves.

Of a causal mask the last piece of a sequence sees all and the first only itself. Devices then have a piece of either half
(`ring_plan.zigzag`), and every step is the same work for all of them (Brandon et al. 2023, arXiv 2311.09431, on the imbalance).
Pieces of which nothing is seen are not computed, and a ring no longer than the mask reaches is gone through.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention import sparse_attention
from pallas_kernels.attention.algebra import Mask
from pallas_kernels.attention.block_mask import check_length
from pallas_kernels.attention.xla_pieces import varying
from research.nn.ring_plan import Case, Plan, plan


class Call(NamedTuple):
    """What is known before anything runs."""

    mask: Mask
    axis: tuple[str, ...]
    devices: int
    softcap: float | None
    scale: float | None
    implementation: str | None

    def plan(self, piece: int) -> Plan:
        return plan(self.mask, piece * self.devices, self.devices)

    def moved(self, tree: Any, by: int) -> Any:
        """Every device's arrays, on the device `by` further."""
        n = self.devices
        return tree if by % n == 0 else _permuted(tree, self.axis, [(i, (i + by) % n) for i in range(n)])


def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    axis: str | Sequence[str],
    softcap: float | None = None,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    sinks: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(scale q k') v of sequences cut over devices, within `jax.shard_map` with `axis` manual: `sparse_attention` of the
    whole ones.

    q: [batch, length / n, q_heads, d_qk]; k: [batch, length / n, kv_heads, d_qk]; v: [batch, length / n, kv_heads, d_v]: device
        i's are positions i * length / n and on, n the number of devices along `axis`. Dtypes as for `sparse_attention`.
    mask: of `masks`, about positions of the whole sequence. One that tells heads or sequences apart tells those that are here.
    axis: a mesh axis, or several, the first outermost.
    segment_ids: int32 [batch, length / n]; a query sees the keys of its own segment only.
    sinks: [q_heads]. softcap, scale, implementation: as for `sparse_attention`. There is no score_mod.

    Returns [batch, length / n, q_heads, d_v] in q's dtype; differentiated once, in reverse, by q, k, v and sinks. Partial sums
    are float32 at least. Queries that see nothing get 0; one that sees what is not finite gets NaN. Raises ValueError for
    shapes that do not fit.
    """
    axis = (axis,) if isinstance(axis, str) else tuple(axis)
    n, t = math.prod(jax.lax.axis_size(a) for a in axis), q.shape[1]
    if not isinstance(mask, Mask):
        raise ValueError(f"mask: got {type(mask).__name__}, wanted a mask such as masks.causal()")
    if k.shape[1] != t or v.shape[1] != t:
        raise ValueError(f"ring_attention: got {t} queries, {k.shape[1]} keys and {v.shape[1]} values, wanted as many of each")
    check_length(mask, n * t, n * t, 0)
    call = Call(mask, axis, n, softcap, scale, implementation)
    q, k, v = varying((q, k, v), q, k, v, *(() if segment_ids is None else (segment_ids,)))
    ordered = functools.partial(_zigzag, call) if call.plan(t).zigzag else lambda x: x
    out, lse = _attend(call, *(ordered(x) for x in (q, k, v)), None if segment_ids is None else ordered(segment_ids))
    if sinks is not None:
        all_lse = jnp.logaddexp(lse, sinks.astype(lse.dtype)[None, None])
        out = out * jnp.exp(lse - all_lse)[..., None]
    out = out.astype(q.dtype)
    return _unzigzag(call, out) if call.plan(t).zigzag else out


def _permuted(tree: Any, axis: tuple[str, ...], pairs: list[tuple[int, int]]) -> Any:
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, pairs), tree)


def _halves(call: Call) -> list[list[tuple[int, int]]]:
    """Of the first and the second halves of contiguous pieces: (device that has it, device that has it in zigzag). The first
    are the even chunks, and of the chunks i and 2n - 1 - i of device i one is even."""
    n = call.devices
    return [[(i, min(chunk, 2 * n - 1 - chunk)) for i, chunk in enumerate(range(half, 2 * n, 2))] for half in range(2)]


def _swapped(call: Call, first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(even chunk, odd chunk) <-> (chunk i, chunk 2n - 1 - i)."""
    even = jax.lax.axis_index(call.axis) % 2 == 0
    return jnp.where(even, first, second), jnp.where(even, second, first)


def _zigzag(call: Call, x_BxTx: jax.Array) -> jax.Array:
    """A contiguous piece's place taken by chunks i and 2n - 1 - i of the sequence."""
    halves = zip(jnp.split(x_BxTx, 2, axis=1), _halves(call))
    return jnp.concatenate(_swapped(call, *(_permuted(half, call.axis, pairs) for half, pairs in halves)), axis=1)


def _unzigzag(call: Call, x_BxTx: jax.Array) -> jax.Array:
    """The inverse of `_zigzag`."""
    halves = zip(_swapped(call, *jnp.split(x_BxTx, 2, axis=1)), _halves(call))
    return jnp.concatenate([_permuted(x, call.axis, [(j, i) for i, j in pairs]) for x, pairs in halves], axis=1)


class Cell(NamedTuple):
    """A piece of queries beside one of keys at a step. index: of the case, from 1 on; 0 where nothing is seen. apart: how far
    the queries begin after the keys. q_at, kv_at: where they stand on the device."""

    index: jax.Array
    apart: jax.Array
    q_at: jax.Array
    kv_at: jax.Array


def _over_cells(call: Call, piece: int, step: jax.Array, one: Callable[[Any, Cell], Any], carry: Any) -> Any:
    """one(carry, cell) for all pairs of pieces of a step."""
    ring = call.plan(piece)
    n, count = ring.chunks.shape
    size = piece // count
    here = jax.lax.axis_index(call.axis)
    chunks, table = jnp.asarray(ring.chunks), jnp.asarray(ring.table)
    mine, theirs = chunks[here], chunks[(here - ring.first - step) % n]

    def body(carry: Any, pair: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        i, j = pair
        cell = Cell(table[mine[i], theirs[j]], (mine[i] - theirs[j]) * size, i * size, j * size)
        return one(carry, cell), None

    pairs = jnp.arange(count * count)
    return jax.lax.scan(body, carry, (pairs // count, pairs % count))[0]


def _piece(x_BxTx: jax.Array, at: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x_BxTx, at, size, axis=1)


def _put(x_BxTx: jax.Array, piece: jax.Array, at: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x_BxTx, piece, at, axis=1)


def _of_case(call: Call, case: Case, apart: jax.Array, segments: Any, q, k, v) -> tuple[jax.Array, jax.Array]:
    """(out, lse) of a piece of queries and one of keys."""
    return sparse_attention(
        q, k, v, case.mask, q_offset=0 if case.placed else apart, segment_ids=segments, softcap=call.softcap, scale=call.scale,
        return_lse=True, implementation=call.implementation,
    )  # fmt: skip


def _sums(x: jax.Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: Call, q, k, v, ids):
    """(out in the dtype of sums, lse) of pieces that lie as the plan says. ids: of segments, or None."""
    return _forward(call, q, k, v, ids)[0]


def _forward(call: Call, q, k, v, ids):
    ring, t = call.plan(q.shape[1]), q.shape[1]
    size = t // ring.chunks.shape[1]

    def nothing(apart, segments, q, k, v):
        lse = jnp.zeros_like(q[..., 0], _sums(q))
        return jnp.zeros_like(q, shape=(*q.shape[:3], v.shape[3])) + 0 * lse[..., None].astype(q.dtype), lse - jnp.inf

    cases = [nothing, *(functools.partial(_of_case, call, case) for case in ring.cases)]

    def step(carry, r):
        visiting, out, lse = carry
        coming = call.moved(visiting, 1)
        k, v, kv_ids = visiting

        def add(sums, cell):
            out, lse = sums
            segments = None if ids is None else (_piece(ids, cell.q_at, size), _piece(kv_ids, cell.kv_at, size))
            pieces = _piece(q, cell.q_at, size), *(_piece(x, cell.kv_at, size) for x in (k, v))
            more, more_lse = jax.lax.switch(cell.index, cases, cell.apart, segments, *pieces)
            old, old_lse = (_piece(x, cell.q_at, size) for x in (out, lse))
            new_lse = jnp.logaddexp(old_lse, more_lse)
            new = _share(old_lse, new_lse) * old + _share(more_lse, new_lse) * more.astype(old.dtype)
            return _put(out, new, cell.q_at), _put(lse, new_lse, cell.q_at)

        return (coming, *_over_cells(call, t, r, add, (out, lse))), None

    lse = jnp.zeros_like(q[..., 0], _sums(q)) - jnp.inf
    out = jnp.zeros((*q.shape[:3], v.shape[3]), lse.dtype) + jnp.zeros_like(lse)[..., None]
    start = (call.moved((k, v, ids), ring.first), out, lse)
    (_, out, lse), _ = jax.lax.scan(step, start, jnp.arange(ring.steps))
    return (out, lse), (q, k, v, ids, out.astype(q.dtype), lse)


def _share(part: jax.Array, whole: jax.Array) -> jax.Array:
    """exp(part - whole) [..., 1] of log-sum-exps; 0 of what holds nothing, 1 of what is NaN by itself."""
    share = jnp.where(part == -jnp.inf, 0, jnp.exp(part - jnp.where(whole == -jnp.inf, 0, whole)))
    return jnp.where(jnp.isnan(part), 1, share)[..., None]


def _backward(call: Call, saved, cotangents):
    q, k, v, ids, out, lse = saved
    d_out, d_lse = cotangents
    ring, t = call.plan(q.shape[1]), q.shape[1]
    size = t // ring.chunks.shape[1]
    # of who sees what is not finite, the keys that it is no part of get nothing
    delta = jnp.where(jnp.isnan(lse), 0, jnp.sum(d_out * out.astype(d_out.dtype), axis=-1) - d_lse)
    lse = jnp.where(jnp.isnan(lse), jnp.inf, lse)

    def nothing(apart, segments, d_out, delta, lse, q, k, v):
        return tuple(jnp.zeros_like(x) for x in (q, k, v))

    def of_case(case, apart, segments, d_out, delta, lse, q, k, v):
        (more, more_lse), pull = jax.vjp(functools.partial(_of_case, call, case, apart, segments), q, k, v)
        share = _share(more_lse, lse)
        inner = jnp.sum(d_out * more.astype(d_out.dtype), axis=-1)
        return pull(((share * d_out).astype(more.dtype), share[..., 0] * (inner - delta)))

    cases = [nothing, *(functools.partial(of_case, case) for case in ring.cases)]

    def step(carry, r):
        visiting, gathered, d_q = carry
        coming, gathered = call.moved(visiting, 1), call.moved(gathered, 1)  # gradients come a step after their keys
        k, v, kv_ids = visiting

        def add(sums, cell):
            segments = None if ids is None else (_piece(ids, cell.q_at, size), _piece(kv_ids, cell.kv_at, size))
            pieces = [_piece(x, cell.q_at, size) for x in (d_out, delta, lse, q)]
            pieces += [_piece(x, cell.kv_at, size) for x in (k, v)]
            more = jax.lax.switch(cell.index, cases, cell.apart, segments, *pieces)
            places = (cell.q_at, cell.kv_at, cell.kv_at)
            return tuple(_put(x, _piece(x, at, size) + y.astype(x.dtype), at) for x, y, at in zip(sums, more, places))

        # apart from what is on its way, so that nothing waits for that
        d_q, *fresh = _over_cells(call, t, r, add, (d_q, *(jnp.zeros_like(x) for x in gathered)))
        return (coming, [x + y for x, y in zip(gathered, fresh)], d_q), None

    d_q, d_k, d_v = (jnp.zeros_like(x, _sums(x)) for x in (q, k, v))
    start = (call.moved((k, v, ids), ring.first), [d_k, d_v], d_q)
    (_, gathered, d_q), _ = jax.lax.scan(step, start, jnp.arange(ring.steps))
    d_k, d_v = call.moved(gathered, -(ring.first + ring.steps - 1))
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attend.defvjp(_forward, _backward)
