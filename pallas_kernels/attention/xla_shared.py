"""Going through a list that is known and shared: nothing is decided while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import xla_tiles as tiles
from pallas_kernels.attention.block_mask import as_block_mask
from pallas_kernels.attention.lists import Sizes
from pallas_kernels.attention.xla_pieces import (
    Piece,
    added,
    each,
    heads_first,
    heads_last,
    kept,
    padded,
    positions,
    spread,
    taken,
    varying,
)
from pallas_kernels.attention.xla_plan import Group, plan

AT_ONCE = 1 << 20  # scores that are computed together
BAND = 1 << 19  # those of several rows of a loop
UNROLLED = 4  # chunks; a loop of more would keep rows from being computed beside each other
BESIDE = 2  # loops that do not wait for each other
ROWS = 2  # steps of a loop that are beside each other; twice as many in a long one
LONG = 24  # steps; in a shorter loop the steps left over would cost more


def _groups(call: Any, sizes: Sizes, by_key: bool, heads: int) -> tuple[Group, ...]:
    blocks = as_block_mask(call.listed, sizes, call.q_offset)
    scores = heads * sizes.q_block * sizes.kv_block
    return plan(blocks, by_key, max(1, AT_ONCE // scores), BAND // scores)


def _sequences(groups: tuple[Group, ...], sizes: Sizes, heads: int) -> int:
    """How many sequences are computed together: several only if they are short."""
    blocks = sum(g.full.size + g.rest.size for g in groups)
    return max(1, AT_ONCE // max(1, blocks * heads * sizes.q_block * sizes.kv_block))


def _over_rows(group: Group, one: Callable[..., Any], carry: Any) -> tuple[Any, Any]:
    """(carry, results [rows, …]) of one(carry, rows [R], full [R, …], rest [R, …], valid) for all rows of a group, `together`
    at a time: in a loop, or, where that is one step, as it stands, with constant slices. Results of `one` are [R, …]."""
    arrays = (group.rows.astype(np.int32), group.full, group.rest, group.valid)
    count = len(group.rows) // group.together
    steps = jax.tree.map(lambda x: x.reshape(count, group.together, *x.shape[1:]), arrays)
    if count == 1:
        return one(carry, *jax.tree.map(lambda x: x[0], steps))
    unroll = ROWS if count < LONG else 2 * ROWS
    carry, results = jax.lax.scan(lambda carry, step: one(carry, *step), carry, jax.tree.map(jnp.asarray, steps), unroll=unroll)
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)


def _over_chunks(one: Callable[..., Any], carry: Any, chunks_RxCxW: Any, valid: Any) -> Any:
    chunks, valid = (None if x is None else x.swapaxes(0, 1) for x in (chunks_RxCxW, valid))
    if len(chunks) <= UNROLLED:
        for i in range(len(chunks)):
            carry = one(carry, chunks[i], None if valid is None else valid[i])
        return carry
    steps = jax.tree.map(jnp.asarray, (chunks, valid))
    return jax.lax.scan(lambda carry, step: (one(carry, *step), None), carry, steps)[0]


def _in_order(groups: tuple[Group, ...], results: list[Any]) -> Any:
    """[rows, …] of all groups, by row."""
    order = np.concatenate([group.rows for group in groups])
    together = jax.tree.map(lambda *parts: jnp.concatenate(parts) if len(parts) > 1 else parts[0], *results)
    if (np.diff(order) > 0).all():
        return together
    return jax.tree.map(lambda x: x[np.argsort(order)], together)


def _blocks(x_NxGxLx: jax.Array, index_RxW: Any, block: int) -> jax.Array:
    """[N, R, G, W * block, …]: the blocks of every row, one after another. Where there are several rows, a row's blocks are
    those of the row before moved by one."""
    n, g, _, *rest = x_NxGxLx.shape
    r, w = index_RxW.shape
    if r == 1:
        return taken(x_NxGxLx, index_RxW[0], block, 2)[:, None]
    bands = [jax.lax.dynamic_slice_in_dim(x_NxGxLx, index_RxW[0, i] * block, r * block, axis=2) for i in range(w)]
    bands = [jnp.moveaxis(band.reshape(n, g, r, block, *rest), 2, 1) for band in bands]
    return jnp.concatenate(bands, axis=3) if w > 1 else bands[0]


def _together(x_NxRxGxLxD: jax.Array) -> jax.Array:
    """[N * R, G * L, D]."""
    n, r, g, length, d = x_NxRxGxLxD.shape
    return x_NxRxGxLxD.reshape(n * r, g * length, d)


def _rows_first(x_XxMx: jax.Array, rows: int) -> jax.Array:
    """[N * R, M, …] -> [R, N, M, …]."""
    return jnp.moveaxis(x_XxMx.reshape(-1, rows, *x_XxMx.shape[1:]), 1, 0)


def _unblocked(x_RxNxMx: jax.Array, group: int) -> jax.Array:
    """[rows, N, G * queries, …] -> [N, G, length, …]."""
    r, n, m, *rest = x_RxNxMx.shape
    return jnp.moveaxis(x_RxNxMx.reshape(r, n, group, m // group, *rest), 0, 2).reshape(n, group, -1, *rest)


def forward(call: Any, q, k, v, sinks, floats, data) -> tuple[jax.Array, jax.Array]:
    """(out [batch, q_len, q_heads, d_v], lse [batch, q_len, q_heads])."""
    sizes, rule, constants = call.sizes, call.rule, (floats, data.others)
    heads, size = q.shape[2], q.shape[2] // k.shape[2]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    groups = _groups(call, sizes, False, heads)

    def sequence(b, q_TxHxD, k_SxNxD, v_SxNxD):
        q_NxGxTxD = heads_first(q_TxHxD, size)
        k_Nx1xSxD, v_Nx1xSxD = (heads_first(x, 1) for x in (k_SxNxD, v_SxNxD))
        piece = Piece(b, np.arange(heads, dtype=np.int32).reshape(-1, size), call.q_offset, None)
        n, d_v = len(v_Nx1xSxD), v_Nx1xSxD.shape[-1]

        def several(masked, rows, full, rest, valid):
            queries = _together(_blocks(q_NxGxTxD, rows[:, None], sizes.q_block))
            q_index = positions(rows[:, None], sizes.q_block)
            apart = (n, len(rows), size, sizes.q_block)

            def add(masked):
                def chunk(sums, columns, valid):
                    where = piece.where(q_index, positions(columns, sizes.kv_block), sizes, False)
                    keys, values = (_together(_blocks(x, columns, sizes.kv_block)) for x in (k_Nx1xSxD, v_Nx1xSxD))
                    every = None if valid is None else spread(valid[0], sizes.kv_block)
                    return tiles.forward(sums, queries, keys, values, rule, where, constants, apart, masked, every)

                return chunk

            many = max(full.shape[1], rest.shape[1]) > UNROLLED
            start = (
                varying(piece.start(sinks, len(rows), sizes.q_block, d_v, dtype), queries, k_Nx1xSxD)
                if many or sinks is not None or not rest.size
                else None
            )
            sums = _over_chunks(add(False), start, full, None)
            sums = _over_chunks(add(masked), sums, rest, valid) if rest.size else sums
            return None, tuple(_rows_first(x, len(rows)) for x in tiles.finished(sums))

        found = [_over_rows(g, lambda _, *step, masked=g.masked: several(masked, *step), None)[1] for g in groups]
        return tuple(heads_last(_unblocked(x, size)) for x in _in_order(groups, found))

    arrays = padded(q, sizes.rows * sizes.q_block), *(padded(x, sizes.columns * sizes.kv_block) for x in (k, v))
    out, lse = each(sequence, arrays, call.on_a_mesh, _sequences(groups, sizes, heads))
    return out[:, : sizes.q_len], lse[:, : sizes.q_len]


def backward(call: Any, q, k, v, floats, data, lse, delta, d_out):
    """Gradients of q, k, v and floats."""
    sizes, rule, constants = call.sizes, call.rule, (floats, data.others)
    heads, size = q.shape[2], q.shape[2] // k.shape[2]
    groups = _groups(call, sizes, True, heads)
    q_block, kv_block = sizes.q_block, sizes.kv_block

    def sequence(b, q, d_out, lse, delta, *keys_and_values):
        queries = [*(heads_first(x, size) for x in (q, d_out)), *(kept(heads_first(x, size)) for x in (lse, delta))]
        k_Nx1xSxD, v_Nx1xSxD = (heads_first(x, 1) for x in keys_and_values)
        k_NxDxS = k_Nx1xSxD[:, 0].swapaxes(1, 2)
        piece = Piece(b, np.arange(heads, dtype=np.int32).reshape(-1, size), call.q_offset, None)
        n, _, t, d = queries[0].shape

        def several(masked, carry, rows, full, rest, valid):
            """A row is a block of keys here, and a column one of queries."""
            r = len(rows)
            keys, values = (_together(_blocks(x, rows[:, None], kv_block)) for x in (k_Nx1xSxD, v_Nx1xSxD))
            turned = jax.lax.dynamic_slice_in_dim(k_NxDxS, rows[0] * kv_block, r * kv_block, axis=2)
            turned = turned.reshape(n, d, r, kv_block).swapaxes(1, 2).reshape(n * r, d, kv_block)
            kv_index = positions(rows[:, None], kv_block)

            def add(masked):
                def chunk(sums, columns, valid):
                    d_k, d_v, d_q, d_floats = sums
                    where = piece.where(positions(columns, q_block), kv_index, sizes, True)
                    parts = [_blocks(x, columns, q_block) for x in queries]
                    beside = tiles.Rows(*(_together(x) for x in parts[:2]), *(x.reshape(n * r, 1, -1) for x in parts[2:]))
                    every = None if valid is None else spread(valid[0], q_block)
                    apart = (n, r, kv_block, size, columns.shape[1] * q_block)
                    more = tiles.backward(beside, keys, turned, values, rule, where, constants, apart, masked, every)
                    part = more[2].reshape(n, r, d, size, -1)
                    d_q = added(d_q, part, columns, q_block)
                    return d_k + more[0], d_v + more[1], d_q, jax.tree.map(jnp.add, d_floats, more[3])

                return chunk

            zeros = varying([jnp.zeros(x.shape, lse.dtype) for x in (keys, values)], queries[0], keys)
            sums = _over_chunks(add(False), (*zeros, *carry), full, None)
            d_k, d_v, *carry = _over_chunks(add(masked), sums, rest, valid) if rest.size else sums
            return tuple(carry), tuple(_rows_first(x, r) for x in (d_k, d_v))

        start = varying((jnp.zeros((n, size, t, d), lse.dtype), jax.tree.map(jnp.zeros_like, floats)), queries[0], k_Nx1xSxD)
        carries, found = [start] * BESIDE, []
        for i, g in enumerate(groups):
            side = i % BESIDE
            carries[side], result = _over_rows(
                g, lambda carry, *step, masked=g.masked: several(masked, carry, *step), carries[side]
            )
            found.append(result)
        d_q, d_floats = jax.tree.map(lambda *parts: sum(parts), *carries)
        d_k, d_v = (heads_last(_unblocked(x, 1)) for x in _in_order(groups, found))
        return heads_last(d_q), d_k, d_v, d_floats

    arrays = [padded(x, sizes.rows * q_block) for x in (q, d_out, lse, delta)]
    arrays += [padded(x, sizes.columns * kv_block) for x in (k, v)]
    d_q, d_k, d_v, d_floats = each(sequence, tuple(arrays), call.on_a_mesh, _sequences(groups, sizes, heads))
    return d_q[:, : sizes.q_len], d_k[:, : sizes.kv_len], d_v[:, : sizes.kv_len], jax.tree.map(lambda x: x.sum(0), d_floats)
