"""Going through lists that are data, or that differ between heads: loops whose ends are read from the lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import xla_tiles as tiles
from pallas_kernels.attention.block_mask import SelectedBlocks, block_lists
from pallas_kernels.attention.lists import EMPTY, BlockLists, Segments, Sizes, transposed
from pallas_kernels.attention.xla_pieces import (
    Piece,
    added,
    each,
    heads_first,
    heads_last,
    padded,
    positions,
    spread,
    taken,
    varying,
)

AT_ONCE = 4  # blocks in one step of a loop


def _lists(call: Any, data: Any, sizes: Sizes, batch: int, heads: int, by_key: bool) -> BlockLists:
    mask = call.listed if data.index is None else SelectedBlocks(data.index, sizes.q_block, sizes.kv_block, call.rule.mask)
    lists = block_lists(mask, sizes, batch, heads, data.q_offset if call.q_offset is None else call.q_offset, data.segments)
    return transposed(lists, sizes.columns) if by_key else lists


def _of_pieces(lists: BlockLists, batch: int, heads: int) -> BlockLists:
    """[pieces, n], a piece being a sequence, or a head of one."""
    count = heads if lists.row.shape[1] > 1 else 1
    return BlockLists(*(jnp.broadcast_to(x, (batch, count, x.shape[-1])).reshape(batch * count, -1) for x in lists))


def _split(x_BxTxHx: jax.Array, heads: int) -> jax.Array:
    """[batch * heads, length, heads of a piece, …]; heads: how many pieces a sequence has."""
    b, t, h, *rest = x_BxTxHx.shape
    return jnp.moveaxis(x_BxTxHx.reshape(b, t, heads, h // heads, *rest), 2, 1).reshape(b * heads, t, h // heads, *rest)


def _unsplit(x_PxTxHx: jax.Array, heads: int) -> jax.Array:
    p, t, h, *rest = x_PxTxHx.shape
    return jnp.moveaxis(x_PxTxHx.reshape(p // heads, heads, t, h, *rest), 1, 2).reshape(p // heads, t, heads * h, *rest)


def _piece(i: Any, pieces: int, heads: int, size: int, offset: Any, segments: Segments | None) -> Piece:
    """The i-th piece of sequences of `pieces` pieces, which have `heads` heads in groups of `size`."""
    first = i % pieces * (heads // pieces)
    head = (first + jnp.arange(heads // pieces, dtype=jnp.int32)).reshape(-1, size)
    return Piece(i // pieces, head, offset, segments)


def _spans(lists: BlockLists, rows: int) -> tuple[jax.Array, jax.Array]:
    """(first entry, how many that are not EMPTY) of each row of a list [n]; in a row, EMPTY entries come last."""
    starts = jnp.searchsorted(lists.row, jnp.arange(rows))
    return starts, jnp.zeros(rows, jnp.int32).at[lists.row].add(lists.kind != EMPTY)


def _over_row(
    column: jax.Array, start: jax.Array, count: jax.Array, one: Callable[..., Any], carry: Any, most: int | None
) -> Any:
    """one(carry, columns, valid) for the blocks of a row, AT_ONCE at a time. most: of a row, for a loop that can be
    differentiated in reverse mode; None for one that ends with the row."""

    def body(i: Any, carry: Any) -> Any:
        inside = i * AT_ONCE + jnp.arange(AT_ONCE)
        return one(carry, column[jnp.minimum(start + inside, len(column) - 1)], inside < count)

    if most is None:
        return jax.lax.fori_loop(0, -(-count // AT_ONCE), body, carry)

    @jax.checkpoint
    def step(carry: Any, i: Any) -> tuple[Any, None]:
        return jax.lax.cond(i * AT_ONCE < count, lambda carry: body(i, carry), lambda carry: carry, carry), None

    return jax.lax.scan(step, carry, jnp.arange(-(-most // AT_ONCE)))[0]


def _per_piece(data: Any, batch: int, pieces: int) -> tuple[jax.Array, Any]:
    """(offsets [batch * pieces], segments of as many sequences or None)."""
    offsets = jnp.repeat(jnp.broadcast_to(data.q_offset, (batch,)), pieces)
    segments = None if data.segments is None else Segments(*(jnp.repeat(ids, pieces, axis=0) for ids in data.segments))
    return offsets, segments


def forward(call: Any, q, k, v, sinks, floats, data) -> tuple[jax.Array, jax.Array]:
    """(out [batch, q_len, q_heads, d_v], lse [batch, q_len, q_heads])."""
    sizes, rule, constants = call.sizes, call.rule, (floats, data.others)
    batch, heads = q.shape[0], q.shape[2]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    lists, most = _lists(call, data, sizes, batch, heads, False), sizes.columns if call.counted else None
    pieces = heads if lists.row.shape[1] > 1 else 1
    if pieces > 1:
        k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
    size = heads // k.shape[2]

    def sequence(i, lists, offset, segments, q, k, v):
        q_NxGxTxD, (k_NxSxD, v_NxSxD) = heads_first(q, size), (x.swapaxes(0, 1) for x in (k, v))
        piece = _piece(i, pieces, heads, size, offset, segments)
        starts, counts = _spans(lists, sizes.rows)
        apart = (q_NxGxTxD.shape[0], 1, size, sizes.q_block)

        def row(r):
            queries = taken(q_NxGxTxD, r[None], sizes.q_block, 2).reshape(q_NxGxTxD.shape[0], -1, q_NxGxTxD.shape[-1])

            def add(sums, columns, valid):
                where = piece.where(
                    positions(r[None, None], sizes.q_block), positions(columns[None], sizes.kv_block), sizes, False
                )
                keys, values = (taken(x, columns, sizes.kv_block, 1) for x in (k_NxSxD, v_NxSxD))
                every = spread(valid, sizes.kv_block)
                return tiles.forward(sums, queries, keys, values, rule, where, constants, apart, True, every)

            start = varying(piece.start(sinks, 1, sizes.q_block, v_NxSxD.shape[-1], dtype), q, k, lists.row)
            return tiles.finished(_over_row(lists.column, starts[r], counts[r], add, start, most))

        out, lse = jax.lax.map(row, jnp.arange(sizes.rows))  # [rows, N, G * queries, …]
        n = q_NxGxTxD.shape[0]
        rows = (x.reshape(sizes.rows, n, size, sizes.q_block, *x.shape[3:]) for x in (out, lse))
        return tuple(heads_last(jnp.moveaxis(x, 0, 2).reshape(n, size, -1, *x.shape[4:])) for x in rows)

    arrays = padded(q, sizes.rows * sizes.q_block), *(padded(x, sizes.columns * sizes.kv_block) for x in (k, v))
    offsets, segments = _per_piece(data, batch, pieces)
    arrays = (_of_pieces(lists, batch, heads), offsets, segments, *(_split(x, pieces) for x in arrays))
    out, lse = (_unsplit(x, pieces) for x in each(sequence, arrays, call.on_a_mesh))
    return out[:, : sizes.q_len], lse[:, : sizes.q_len]


def backward(call: Any, q, k, v, floats, data, lse, delta, d_out):
    """Gradients of q, k, v and floats."""
    sizes, rule, constants = call.sizes, call.rule, (floats, data.others)
    batch, heads, kv_heads = q.shape[0], q.shape[2], k.shape[2]
    lists, most = _lists(call, data, sizes, batch, heads, True), sizes.rows if call.counted else None
    pieces = heads if lists.row.shape[1] > 1 else 1
    if pieces > 1:
        k, v = (jnp.repeat(x, heads // kv_heads, axis=2) for x in (k, v))
    size = heads // k.shape[2]

    def sequence(i, lists, offset, segments, q, d_out, lse, delta, k, v):
        q, d_out, lse, delta = (heads_first(x, size) for x in (q, d_out, lse, delta))
        k_NxSxD, v_NxSxD = (x.swapaxes(0, 1) for x in (k, v))
        k_NxDxS = k_NxSxD.swapaxes(1, 2)
        piece = _piece(i, pieces, heads, size, offset, segments)
        starts, counts = _spans(lists, sizes.columns)
        n, _, t, d = q.shape

        def row(carry, r):
            """A row is a block of keys here, and a column one of queries."""
            keys, values = (taken(x, r[None], sizes.kv_block, 1) for x in (k_NxSxD, v_NxSxD))
            turned = taken(k_NxDxS, r[None], sizes.kv_block, 2)

            def add(sums, columns, valid):
                d_k, d_v, d_q, d_floats = sums
                where = piece.where(
                    positions(columns[None], sizes.q_block), positions(r[None, None], sizes.kv_block), sizes, True
                )
                parts = [taken(x, columns, sizes.q_block, 2) for x in (q, d_out, lse, delta)]
                wide = [x.reshape(n, -1, x.shape[-1]) for x in parts[:2]]
                rows = tiles.Rows(*wide, *(x.reshape(n, 1, -1) for x in parts[2:]))
                every = spread(valid, sizes.q_block)
                apart = (n, 1, sizes.kv_block, size, len(columns) * sizes.q_block)
                more = tiles.backward(rows, keys, turned, values, rule, where, constants, apart, True, every)
                d_floats = jax.tree.map(jnp.add, d_floats, more[3])
                return (
                    d_k + more[0],
                    d_v + more[1],
                    added(d_q, more[2].reshape(n, 1, d, size, -1), columns[None], sizes.q_block),
                    d_floats,
                )

            zeros = varying([jnp.zeros(x.shape, lse.dtype) for x in (keys, values)], q, k, lists.row)
            d_k, d_v, *carry = _over_row(lists.column, starts[r], counts[r], add, (*zeros, *carry), most)
            return tuple(carry), (d_k, d_v)

        start = varying((jnp.zeros((n, size, t, d), lse.dtype), jax.tree.map(jnp.zeros_like, floats)), q, k, lists.row)
        (d_q, d_floats), (d_k, d_v) = jax.lax.scan(row, start, jnp.arange(sizes.columns))
        d_k, d_v = (jnp.moveaxis(x, 0, 1).reshape(n, -1, x.shape[-1]).swapaxes(0, 1) for x in (d_k, d_v))
        return heads_last(d_q), d_k, d_v, d_floats

    offsets, segments = _per_piece(data, batch, pieces)
    arrays = [padded(x, sizes.rows * sizes.q_block) for x in (q, d_out, lse, delta)]
    arrays += [padded(x, sizes.columns * sizes.kv_block) for x in (k, v)]
    arrays = (_of_pieces(lists, batch, heads), offsets, segments, *(_split(x, pieces) for x in arrays))
    *found, d_floats = each(sequence, arrays, call.on_a_mesh)
    d_q, d_k, d_v = (_unsplit(x, pieces) for x in found)
    d_k, d_v = (x.reshape(*x.shape[:2], kv_heads, -1, x.shape[-1]).sum(3)[:, : sizes.kv_len] for x in (d_k, d_v))
    return d_q[:, : sizes.q_len], d_k, d_v, jax.tree.map(lambda x: x.sum(0), d_floats)
