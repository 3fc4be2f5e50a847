"""What the two ways of going through lists share: sequences one after another, and how arrays are cut into blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.lists import Segments, Sizes
from pallas_kernels.attention.xla_tiles import Sums, Where

SLICED = 16  # blocks that are sliced one by one; more are gathered


def padded(x_BxTx: jax.Array, length: int) -> jax.Array:
    """Zeros to the end of the last block."""
    short = length - x_BxTx.shape[1]
    return jnp.pad(x_BxTx, [(0, 0), (0, short), *[(0, 0)] * (x_BxTx.ndim - 2)]) if short else x_BxTx


def varying(tree: Any, *beside: jax.Array) -> Any:
    """Arrays to start a loop with, which within `jax.shard_map` vary over the mesh axes that those beside them do: none of
    their values is added."""
    nothing = [jnp.where(False, x.reshape(-1)[0], 0) for x in beside]
    return jax.tree.map(lambda x: x + sum(n.astype(x.dtype) for n in nothing), tree)


def kept(x: jax.Array) -> jax.Array:
    """x, as an array of its own. XLA's CPU compiler fuses what is cheap into every loop that reads it, be it layouts whose
    indices then keep the loop from being vectorized; a remainder counts as dear. (It drops `lax.optimization_barrier` before.)
    """
    return jax.lax.rem(x, jnp.full_like(x, jnp.inf))


def heads_first(x_TxHx: jax.Array, group: int) -> jax.Array:
    """[length, heads, …] -> [heads / group, group, length, …]."""
    t, h, *rest = x_TxHx.shape
    return jnp.moveaxis(x_TxHx.reshape(t, h // group, group, *rest), 0, 2)


def heads_last(x_NxGxTx: jax.Array) -> jax.Array:
    n, group, t, *rest = x_NxGxTx.shape
    return jnp.moveaxis(x_NxGxTx, 2, 0).reshape(t, n * group, *rest)


def each(one: Callable[..., Any], arrays: Any, on_a_mesh: bool, together: int = 1) -> Any:
    """one(index, *arrays of one sequence), results stacked. `together` sequences at a time, which keeps what is computed
    together in cache; all at once on a mesh, which may split them."""
    count = jax.tree.leaves(arrays)[0].shape[0]
    if count == 1:
        return jax.tree.map(lambda x: x[None], one(0, *jax.tree.map(lambda x: x[0], arrays)))
    mapped = (jnp.arange(count), *arrays)
    if on_a_mesh or together >= count:
        return jax.vmap(one)(*mapped)
    return jax.lax.map(lambda x: one(*x), mapped, batch_size=together if together > 1 else None)


def taken(x_NxLxD: jax.Array, index: Any, block: int, axis: int) -> jax.Array:
    """Blocks of `axis`, one after another. index: ints [n], NumPy where they are known."""
    index = np.asarray(index) if not isinstance(index, jax.Array) else index
    known = isinstance(index, np.ndarray)
    if known and (np.diff(index) == 1).all():
        return jax.lax.slice_in_dim(x_NxLxD, int(index[0]) * block, (int(index[-1]) + 1) * block, axis=axis)
    if len(index) <= SLICED:
        parts = [jax.lax.dynamic_slice_in_dim(x_NxLxD, index[i] * block, block, axis=axis) for i in range(len(index))]
        return jnp.concatenate(parts, axis=axis) if len(parts) > 1 else parts[0]
    shape = x_NxLxD.shape
    cut = x_NxLxD.reshape(*shape[:axis], shape[axis] // block, block, *shape[axis + 1 :])
    got = jnp.take(cut, index, axis=axis)
    return got.reshape(*shape[:axis], len(index) * block, *shape[axis + 1 :])


def positions(index_RxW: Any, block: int) -> Any:
    """int32 [R, n * block] of blocks [R, n]."""
    xp = jnp if isinstance(index_RxW, jax.Array) else np
    index = xp.asarray(index_RxW)
    return (index[:, :, None] * block + np.arange(block)[None, None]).reshape(len(index), -1).astype(np.int32)


def spread(valid: Any, block: int) -> Any:
    """bool [blocks] for every position of them, as the last axis of scores."""
    return None if valid is None else jnp.repeat(jnp.asarray(valid), block)


def added(d_q_NxGxTxD: jax.Array, part_NxRxDxGxM: jax.Array, columns_RxW: Any, block: int) -> jax.Array:
    """Adds what blocks of queries get: in place, or, where it is several rows at known places, as one sum."""
    n, r, d, group, _ = part_NxRxDxGxM.shape
    w, known = columns_RxW.shape[1], isinstance(columns_RxW, np.ndarray)
    joined = known and r == 1 and (np.diff(columns_RxW[0]) == 1).all()
    part_NxGxRxMxD = jnp.transpose(part_NxRxDxGxM, (0, 3, 1, 4, 2))
    for start, stop in [(0, w)] if joined else [(i, i + 1) for i in range(w)]:
        part = part_NxGxRxMxD[:, :, :, start * block : stop * block].reshape(n, group, -1, d)
        at, length = columns_RxW[0, start] * block, part.shape[2]
        if known and r > 1:
            end = d_q_NxGxTxD.shape[2] - int(at) - length
            d_q_NxGxTxD += jnp.pad(part, [(0, 0), (0, 0), (int(at), end), (0, 0)])
            continue
        old = jax.lax.dynamic_slice_in_dim(d_q_NxGxTxD, at, length, axis=2)
        d_q_NxGxTxD = jax.lax.dynamic_update_slice_in_dim(d_q_NxGxTxD, old + part, at, axis=2)
    return d_q_NxGxTxD


class Piece:
    """One sequence: which it is, and its heads [N, G]."""

    def __init__(self, batch: Any, head: Any, q_offset: Any, segments: Segments | None):
        self.batch, self.head, self.q_offset, self.segments = batch, head, q_offset, segments

    def where(self, q_index_RxQ: Any, kv_index_RxK: Any, sizes: Sizes, turned: bool) -> Where:
        """For scores [N, R, G, queries, keys]; turned: [N, R, keys, G, queries]."""
        kv_len = sizes.kv_len if sizes.kv_len % sizes.kv_block else None
        r = len(q_index_RxQ)

        def shaped(queries: Any, keys: Any) -> tuple[Any, Any]:
            if turned:
                return queries.reshape(1, r, 1, 1, -1), keys.reshape(1, r, -1, 1, 1)
            return queries.reshape(1, r, 1, -1, 1), keys.reshape(1, r, 1, 1, -1)

        head = self.head[:, None, None, :, None] if turned else self.head[:, None, :, None, None]
        segments = (None, None)
        if self.segments is not None:
            ids = (jnp.take(ids, at, mode="clip") for ids, at in zip(self.segments, (q_index_RxQ, kv_index_RxK)))
            segments = shaped(*ids)
        return Where(self.batch, head, *shaped(q_index_RxQ + self.q_offset, kv_index_RxK), kv_len, *segments)

    def start(self, sinks: jax.Array | None, rows: int, queries: int, d_v: int, dtype: Any) -> Sums:
        """Sums before any key: the sink's, or nothing."""
        n, group = self.head.shape
        top = jnp.full((n, group), -jnp.inf, dtype) if sinks is None else sinks[self.head].astype(dtype)
        top = jnp.broadcast_to(top[:, None, :, None], (n, rows, group, queries)).reshape(n * rows, -1, 1)
        total = jnp.zeros_like(top) if sinks is None else jnp.ones_like(top)
        return Sums(top, total, jnp.zeros((n * rows, group * queries, d_v), dtype))
