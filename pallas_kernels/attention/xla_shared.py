"""Going through a list that is known and shared: nothing is decided while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import xla_tiles as tiles
from pallas_kernels.attention.block_mask import block_lists
from pallas_kernels.attention.lists import Sizes, transposed
from pallas_kernels.attention.xla_pieces import Piece, added, each, heads_first, heads_last, padded, positions, spread, taken
from pallas_kernels.attention.xla_plan import Group, Hashed, plan

AT_ONCE = 1 << 19  # scores that are computed together: what stays in cache
UNROLLED = 2  # chunks; more are a loop


def _groups(call: Any, sizes: Sizes, by_key: bool, heads: int) -> tuple[Group, ...]:
    lists = block_lists(call.listed, sizes, 1, 1, call.q_offset, None)
    lists = transposed(lists, sizes.columns) if by_key else lists
    return plan(Hashed.of(lists), max(1, AT_ONCE // (heads * sizes.q_block * sizes.kv_block)))


def _over_rows(group: Group, one: Callable[..., Any], carry: Any) -> tuple[Any, Any]:
    """(carry, results [rows, …]) of one(carry, row, full, rest, valid) for every row of a group: in a loop, or, where there is a
    single one, as it stands, with constant slices."""
    arrays = (group.rows.astype(np.int32), group.full, group.rest, group.valid)
    if len(group.rows) == 1:
        carry, result = one(carry, *jax.tree.map(lambda x: x[0], arrays))
        return carry, jax.tree.map(lambda x: x[None], result)
    return jax.lax.scan(lambda carry, step: one(carry, *step), carry, jax.tree.map(jnp.asarray, arrays))


def _over_chunks(one: Callable[..., Any], carry: Any, chunks: Any, valid: Any) -> Any:
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


def _unblocked(x_RxNxMx: jax.Array, group: int) -> jax.Array:
    """[rows, N, G * queries, …] -> [N, G, length, …]."""
    r, n, m, *rest = x_RxNxMx.shape
    return jnp.moveaxis(x_RxNxMx.reshape(r, n, group, m // group, *rest), 0, 2).reshape(n, group, -1, *rest)


def forward(call: Any, q, k, v, sinks, floats, data) -> tuple[jax.Array, jax.Array]:
    """(out [batch, q_len, q_heads, d_v], lse [batch, q_len, q_heads])."""
    sizes, rule, constants = call.forward, call.rule, (floats, data.others)
    heads, size = q.shape[2], q.shape[2] // k.shape[2]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    groups = _groups(call, sizes, False, heads)

    def sequence(b, q_TxHxD, k_SxNxD, v_SxNxD):
        q_NxGxTxD, (k_NxSxD, v_NxSxD) = heads_first(q_TxHxD, size), (x.swapaxes(0, 1) for x in (k_SxNxD, v_SxNxD))
        piece = Piece(b, np.arange(heads).reshape(-1, size), call.q_offset, None)
        n, d_v = v_NxSxD.shape[0], v_NxSxD.shape[2]

        def row(masked, r, full, rest, valid):
            queries = taken(q_NxGxTxD, r[None], sizes.q_block, 2).reshape(n, -1, q_NxGxTxD.shape[-1])

            def add(masked):
                def chunk(sums, columns, valid):
                    where = piece.where(positions(r[None], sizes.q_block), positions(columns, sizes.kv_block), sizes, False)
                    keys, values = (taken(x, columns, sizes.kv_block, 1) for x in (k_NxSxD, v_NxSxD))
                    every = spread(valid, sizes.kv_block)
                    return tiles.forward(sums, queries, keys, values, rule, where, constants, size, masked, every)

                return chunk

            many = max(len(full), len(rest)) > UNROLLED
            start = piece.start(sinks, sizes.q_block, d_v, dtype) if many or sinks is not None or not rest.size else None
            sums = _over_chunks(add(False), start, full, None)
            return tiles.finished(_over_chunks(add(masked), sums, rest, valid) if rest.size else sums)

        found = [_over_rows(g, lambda _, *step, masked=g.masked: (None, row(masked, *step)), None)[1] for g in groups]
        return tuple(heads_last(_unblocked(x, size)) for x in _in_order(groups, found))

    arrays = padded(q, sizes.rows * sizes.q_block), *(padded(x, sizes.columns * sizes.kv_block) for x in (k, v))
    out, lse = each(sequence, arrays, call.on_a_mesh)
    return out[:, : sizes.q_len], lse[:, : sizes.q_len]


def backward(call: Any, q, k, v, floats, data, lse, delta, d_out):
    """Gradients of q, k, v and floats."""
    sizes, rule, constants = call.backward, call.rule, (floats, data.others)
    heads, size = q.shape[2], q.shape[2] // k.shape[2]
    groups = _groups(call, sizes, True, heads)
    q_block = sizes.q_block

    def sequence(b, q, d_out, lse, delta, *keys_and_values):
        q, d_out, lse, delta = (heads_first(x, size) for x in (q, d_out, lse, delta))  # [N, G, T, …]
        k_NxSxD, v_NxSxD = (x.swapaxes(0, 1) for x in keys_and_values)
        clean = jnp.where(jnp.isfinite(k_NxSxD), k_NxSxD, 0)
        piece = Piece(b, np.arange(heads).reshape(-1, size), call.q_offset, None)
        n, _, t, d = q.shape

        def row(masked, carry, r, full, rest, valid):
            """A row is a block of keys here, and a column one of queries."""
            keys, clean_keys, values = (taken(x, r[None], sizes.kv_block, 1) for x in (k_NxSxD, clean, v_NxSxD))
            where_keys = positions(r[None], sizes.kv_block)

            def add(masked):
                def chunk(sums, columns, valid):
                    d_k, d_v, d_q, d_floats = sums
                    where = piece.where(positions(columns, q_block), where_keys, sizes, True)
                    parts = [taken(x, columns, q_block, 2) for x in (q, d_out, lse, delta)]
                    wide = [x.reshape(n, -1, x.shape[-1]) for x in parts[:2]]
                    rows = tiles.Rows(*wide, *(x.reshape(n, 1, -1) for x in parts[2:]))
                    every = spread(valid, q_block)
                    more = tiles.backward(rows, keys, clean_keys, values, rule, where, constants, size, masked, every)
                    return d_k + more[0], d_v + more[1], added(d_q, more[2], columns, q_block), _sum(d_floats, more[3])

                return chunk

            d_q, d_floats = carry
            zeros = (jnp.zeros(x.shape, lse.dtype) for x in (keys, values))
            sums = _over_chunks(add(False), (*zeros, d_q, d_floats), full, None)
            d_k, d_v, d_q, d_floats = _over_chunks(add(masked), sums, rest, valid) if rest.size else sums
            return (d_q, d_floats), (d_k, d_v)

        carry, found = (jnp.zeros((n, d, size, t), lse.dtype), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), floats)), []
        for g in groups:
            carry, result = _over_rows(g, lambda carry, *step, masked=g.masked: row(masked, carry, *step), carry)
            found.append(result)
        d_k, d_v = (jnp.moveaxis(x, 0, 1).reshape(n, -1, x.shape[-1]).swapaxes(0, 1) for x in _in_order(groups, found))
        return heads_last(jnp.moveaxis(carry[0], 1, 3)), d_k, d_v, carry[1]

    queries = (padded(x, sizes.rows * q_block) for x in (q, d_out, lse, delta))
    d_q, d_k, d_v, d_floats = each(
        sequence, (*queries, *(padded(x, sizes.columns * sizes.kv_block) for x in (k, v))), call.on_a_mesh
    )
    return d_q[:, : sizes.q_len], d_k[:, : sizes.kv_len], d_v[:, : sizes.kv_len], jax.tree.map(lambda x: x.sum(0), d_floats)


def _sum(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)
