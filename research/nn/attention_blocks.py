"""Attention of whole sequences by blocks of positions, whose backward pass keeps a normalizer a query and no scores.

As in FlashAttention (Dao et al. 2022, arXiv 2205.14135, algorithms 1 and 4), but a block of queries takes all of its keys at
once: what matters on CPU is that the scores of a few heads stay in cache. With S = Q K' and P = exp(S - log of its row sums):
    dV = P' dO,   dS = P * (dO V' - row sums of dO * O),   dQ = dS K,   dK = dS' Q.

N counts the key heads (or the sequences) that are computed together, G the query heads a key head. Reverse mode only, any
number of times.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.nn.products import rounded


class Extent(NamedTuple):
    """Which pairs of positions see each other: `before` and `after` are how many positions to each side, None for all."""

    before: int | None
    after: int | None

    def keys(self, start: int, stop: int, length: int) -> tuple[int, int]:
        """The first key that one of the queries start .. stop - 1 sees, and the one after the last."""
        first = 0 if self.before is None else max(0, start - self.before)
        return first, length if self.after is None else min(length, stop + self.after)

    def queries(self, start: int, stop: int, length: int) -> tuple[int, int]:
        """The same, of queries that see one of these keys."""
        return Extent(self.after, self.before).keys(start, stop, length)

    def seen(self, queries: range, keys: range) -> np.ndarray | None:
        """bool [queries, keys]; None where all of them are seen."""
        distance = np.asarray(queries)[:, None] - np.asarray(keys)[None]
        seen = np.ones(distance.shape, bool)
        if self.before is not None:
            seen &= distance <= self.before
        if self.after is not None:
            seen &= distance >= -self.after
        return None if seen.all() else seen


def _blocks(length: int, size: int) -> Iterator[range]:
    for start in range(0, length, size):
        yield range(start, min(start + size, length))


def _part(x: jax.Array, positions: range) -> jax.Array:
    """Positions of [..., length, head_dim]."""
    return x[..., positions.start : positions.stop, :]


def _rows(x_NxGxTxD: jax.Array, positions: range) -> jax.Array:
    """[N, G x positions, D]."""
    part = _part(x_NxGxTxD, positions)
    return part.reshape(part.shape[0], -1, part.shape[-1])


def _along(x_NxGxT: jax.Array, positions: range) -> jax.Array:
    """[N, 1, G x positions]."""
    part = x_NxGxT[..., positions.start : positions.stop]
    return part.reshape(part.shape[0], 1, -1)


def _forward_one(q_NxGxTxD, k_NxTxD, v_NxTxD, extent: Extent, block: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    """(output [N, G, T, D], log of the normalizer [N, G, T]) of scaled queries."""
    n, group, length, d = q_NxGxTxD.shape
    outputs, normalizers = [], []
    for queries in _blocks(length, block):
        keys = range(*extent.keys(queries.start, queries.stop, length))
        scores = rounded("nqd,nkd->nqk", _rows(q_NxGxTxD, queries), _part(k_NxTxD, keys), dtype)
        seen = extent.seen(queries, keys)
        if seen is not None:
            scores = jnp.where(np.tile(seen, (group, 1))[None], scores, -jnp.inf)
        top = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        output = rounded("nqk,nkd->nqd", weights, _part(v_NxTxD, keys), dtype) / total
        outputs.append(output.reshape(n, group, -1, d))
        normalizers.append((top + jnp.log(total)).reshape(n, group, -1))
    return jnp.concatenate(outputs, axis=2), jnp.concatenate(normalizers, axis=2)


def _backward_one(q_NxGxTxD, k_NxTxD, v_NxTxD, output_NxGxTxD, normalizer_NxGxT, d_output_NxGxTxD, extent, block, dtype):
    """Gradients of scaled queries, of keys and of values."""
    n, group, length, d = q_NxGxTxD.shape
    correction_NxGxT = jnp.sum(output_NxGxTxD * d_output_NxGxTxD, axis=-1)
    d_q_NxDxGxT, d_k, d_v = jnp.zeros((n, d, group, length)), [], []
    for keys in _blocks(length, block):
        queries = range(*extent.queries(keys.start, keys.stop, length))
        rows, d_rows = _rows(q_NxGxTxD, queries), _rows(d_output_NxGxTxD, queries)
        key, value = _part(k_NxTxD, keys), _part(v_NxTxD, keys)
        # keys by queries: neither the gradient of keys nor that of values then needs the weights turned round
        weights = jnp.exp(rounded("nkd,nqd->nkq", key, rows, dtype) - _along(normalizer_NxGxT, queries))
        seen = extent.seen(queries, keys)
        if seen is not None:
            weights = jnp.where(np.tile(seen.T, (1, group))[None], weights, 0.0)
        d_scores = weights * (rounded("nkd,nqd->nkq", value, d_rows, dtype) - _along(correction_NxGxT, queries))
        d_v.append(rounded("nkq,nqd->nkd", weights, d_rows, dtype))
        d_k.append(rounded("nkq,nqd->nkd", d_scores, rows, dtype))
        part = rounded("nkd,nkq->ndq", key, d_scores, dtype).reshape(n, d, group, -1)
        d_q_NxDxGxT += jnp.pad(part, [(0, 0)] * 3 + [(queries.start, length - queries.stop)])
    return jnp.moveaxis(d_q_NxDxGxT, 1, 3), jnp.concatenate(d_k, axis=1), jnp.concatenate(d_v, axis=1)


def _pieces(x_BxTxKxGxD: jax.Array, over_heads: bool) -> jax.Array:
    """What is computed one after another, first: key heads [B, T, G, D], or sequences [T, K, G, D]."""
    return jnp.moveaxis(x_BxTxKxGxD, 2, 0) if over_heads else x_BxTxKxGxD


def _joined(pieces: jax.Array, over_heads: bool) -> jax.Array:
    return jnp.moveaxis(pieces, 0, 2) if over_heads else pieces


def _heads_first(piece: jax.Array, over_heads: bool) -> jax.Array:
    """A piece as [N, G, T, D]. Transposed inside the loop, where it stays in cache."""
    return piece.transpose((0, 2, 1, 3) if over_heads else (1, 2, 0, 3))


def _heads_last(x_NxGxTxD: jax.Array, over_heads: bool) -> jax.Array:
    return x_NxGxTxD.transpose((0, 2, 1, 3) if over_heads else (2, 0, 1, 3))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def attention(q_BxTxKxGxD, k_BxTxKx1xD, v_BxTxKx1xD, extent: Extent, block: int, dtype: str, over_heads: bool) -> jax.Array:
    """softmax(q k / sqrt(D)) v over the pairs in `extent`, float32 [batch, length, key heads, query heads a key head,
    head_dim].

    over_heads: one key head after another for the whole batch; otherwise one sequence after another for all heads.
    """
    return _forward(q_BxTxKxGxD, k_BxTxKx1xD, v_BxTxKx1xD, extent, block, dtype, over_heads)[0]


def _forward(q, k, v, extent: Extent, block: int, dtype: str, over_heads: bool):
    def one(parts):
        q, k, v = (_heads_first(x, over_heads) for x in parts)
        output, normalizer = _forward_one(q * q.shape[-1] ** -0.5, k[:, 0], v[:, 0], extent, block, dtype)
        return _heads_last(output, over_heads), normalizer

    output, normalizers = jax.lax.map(one, tuple(_pieces(x, over_heads) for x in (q, k, v)))
    output = _joined(output, over_heads)
    return output, (q, k, v, output, normalizers)


def _backward(extent: Extent, block: int, dtype: str, over_heads: bool, saved, d_output):
    def one(parts):
        *arrays, normalizer = parts
        q, k, v, output, d_output = (_heads_first(x, over_heads) for x in arrays)
        scale = q.shape[-1] ** -0.5
        d_q, d_k, d_v = _backward_one(q * scale, k[:, 0], v[:, 0], output, normalizer, d_output, extent, block, dtype)
        return tuple(_heads_last(x, over_heads) for x in (d_q * scale, d_k[:, None], d_v[:, None]))

    *arrays, normalizers = saved
    pieces = tuple(_pieces(x, over_heads) for x in (*arrays, d_output))
    return tuple(_joined(x, over_heads) for x in jax.lax.map(one, (*pieces, normalizers)))


attention.defvjp(_forward, _backward)
