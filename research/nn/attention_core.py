"""Attention on queries, keys and values: which positions see which, the plain formula, and a form that skips what is masked.

Softmax is float32. Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245): H query heads share K key heads, H % K ==
0, query head h reading key head h // (H / K).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from research.core.names import choose
from research.nn.attention_blocks import Extent, attention
from research.nn.layout import on_a_mesh
from research.nn.products import contract

MASKED = -1e30  # finite: a row that sees nothing gives the mean of all values, and no NaN
BLOCK = 128  # queries at a time: scores of a few heads stay in cache
MOST_BLOCKS = 16  # an unrolled loop: more would take long to compile


def visible(query_T, key_S, causal: bool, window: int | None):
    """bool [T, S]: may the query at position query_T[t] see the key at key_S[s]? Negative key positions are empty slots. A
    causal window holds the `window` latest positions, the query's own included; otherwise it reaches window - 1 to each
    side."""
    distance = query_T[:, None] - key_S[None, :]
    seen = (query_T[:, None] >= 0) & (key_S[None, :] >= 0)
    if causal:
        seen = seen & (distance >= 0)
    if window is not None:
        seen = seen & (distance < window) & (distance > -window)
    return seen


def _weighed(q_NxTxD, k_NxSxD, v_NxSxD, visible_NxTxS, dtype: str) -> jax.Array:
    """softmax(q k / sqrt(D)) v over the visible keys, for N heads at once (Vaswani et al. 2017, arXiv 1706.03762, eq. 1)."""
    scores = contract("ntd,nsd->nts", q_NxTxD * q_NxTxD.shape[-1] ** -0.5, k_NxSxD, dtype)
    weights = jax.nn.softmax(jnp.where(visible_NxTxS, scores, MASKED), axis=-1)
    return contract("nts,nsd->ntd", weights, v_NxSxD, dtype)


def attend(q_BxTxHxD, k_BxSxKxD, v_BxSxKxD, visible_TxS, dtype: str) -> jax.Array:
    """softmax(q k / sqrt(D)) v over the visible keys: float32 [B, T, H, D]. The queries of a group of heads that share a key
    head stand one after another, as if of one longer sequence."""
    b, t, h, d = q_BxTxHxD.shape
    heads = k_BxSxKxD.shape[2]
    q = q_BxTxHxD.reshape(b, t, heads, -1, d).transpose(0, 2, 3, 1, 4).reshape(b * heads, -1, d)
    k, v = (x.swapaxes(1, 2).reshape(b * heads, -1, d) for x in (k_BxSxKxD, v_BxSxKxD))
    out = _weighed(q, k, v, jnp.tile(visible_TxS, (h // heads, 1))[None], dtype)
    return out.reshape(b, heads, -1, t, d).transpose(0, 3, 1, 2, 4).reshape(b, t, h, d)


def dense(q, k, v, causal: bool, window: int | None, dtype: str) -> jax.Array:
    """The plain formula over all T x T pairs."""
    positions = np.arange(q.shape[1])
    return attend(q, k, v, visible(positions, positions, causal, window), dtype)


def _folded(q_BxTxHxD, k_BxTxKxD, v_BxTxKxD, causal: bool, window: int, dtype: str) -> jax.Array:
    """Blocks of `window` queries, all at once: a block sees itself and its neighbours (the one before, where causal)."""
    b, t, h, d = q_BxTxHxD.shape
    count = -(-t // window)
    neighbours = (-1, 0) if causal else (-1, 0, 1)

    def blocks(x):
        padded = jnp.pad(x, [(0, 0), (0, count * window - t), (0, 0), (0, 0)])
        return padded.reshape(b, count, window, -1, d)

    def with_neighbours(x):
        padded = jnp.pad(blocks(x), [(0, 0), (1, 1), (0, 0), (0, 0), (0, 0)])
        return jnp.concatenate([padded[:, 1 + n : 1 + n + count] for n in neighbours], axis=2)

    offsets = np.concatenate([np.arange(window) + n * window for n in neighbours])
    rows = []
    for i in range(count):
        keys = i * window + offsets
        rows.append(visible(i * window + np.arange(window), np.where(keys < t, keys, -1), causal, window))
    heads = k_BxTxKxD.shape[2]
    q = blocks(q_BxTxHxD).reshape(b, count, window, heads, -1, d).transpose(0, 1, 3, 4, 2, 5).reshape(b * count * heads, -1, d)
    k, v = (with_neighbours(x).swapaxes(2, 3).reshape(b * count * heads, -1, d) for x in (k_BxTxKxD, v_BxTxKxD))
    seen = jnp.asarray(np.stack(rows))[:, None].repeat(heads, axis=1).reshape(count * heads, window, -1)
    out = _weighed(q, k, v, jnp.tile(seen, (b, h // heads, 1)), dtype)
    return out.reshape(b, count, heads, -1, window, d).transpose(0, 1, 4, 2, 3, 5).reshape(b, -1, h, d)[:, :t]


def blockwise(q, k, v, causal: bool, window: int | None, dtype: str) -> jax.Array:
    """`dense` by blocks of queries, each with the keys that one of them can see; going backward scores are computed again.

    A short window is one product of all blocks. Otherwise one sequence after another, which keeps the scores in cache, or,
    where a mesh may split the batch, one key head after another (and no forward-mode derivative, see `nn.attention_blocks`).
    """
    if window is not None and window <= BLOCK:
        return jax.checkpoint(functools.partial(_folded, causal=causal, window=window, dtype=dtype))(q, k, v)
    b, t, h, d = q.shape
    reach = None if window is None else window - 1
    extent = Extent(reach, 0 if causal else reach)
    grouped = q.reshape(b, t, k.shape[2], -1, d), k[:, :, :, None], v[:, :, :, None]
    return attention(*grouped, extent, max(BLOCK, -(-t // MOST_BLOCKS)), dtype, on_a_mesh()).reshape(b, t, h, d)


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {"dense": dense, "blockwise": blockwise}


def dot_product_attention(
    q_BxTxHxD, k_BxTxKxD, v_BxTxKxD, *, causal: bool, window: int | None, dtype: str, implementation: str
) -> jax.Array:
    """Self-attention of a whole sequence, float32 [batch, length, heads, head_dim].

    window: None, or how many positions a query sees (see `visible`). dtype: what the operands of the two products are rounded
    to. implementation: a name in IMPLEMENTATIONS; they all compute the same function. Raises ValueError for another name.
    """
    run = choose(IMPLEMENTATIONS, implementation, "attention")
    return run(q_BxTxHxD, k_BxTxKxD, v_BxTxKxD, causal, window, dtype)
