"""Attention on queries, keys and values: which positions see which, the plain formula, and a form that skips what is masked.

Softmax is float32. Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245): H query heads share K key heads, H % K ==
0, query head h reading key head h // (H / K).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from research.core.names import choose
from research.nn.linear import contract

MASKED = -1e30  # finite, so that a row that sees nothing gives zeros / a mean and no NaN
BLOCK = 128


def visible(query_T, key_S, causal: bool, window: int | None):
    """bool [T, S]: may the query at position query_T[t] see the key at key_S[s]? Negative key positions are empty slots. A
    causal window holds the `window` latest positions, the query's own included; without causality it reaches window - 1 to
    each side."""
    distance = query_T[:, None] - key_S[None, :]
    seen = key_S[None, :] >= 0
    if causal:
        seen = seen & (distance >= 0)
    if window is not None:
        seen = seen & (distance < window) & (distance > -window)
    return seen


def attend(q_BxTxHxD, k_BxSxKxD, v_BxSxKxD, visible_TxS, dtype: str) -> jax.Array:
    """softmax(q k / sqrt(D)) v over the visible keys: float32 [B, T, H, D] (Vaswani et al. 2017, arXiv 1706.03762, eq. 1)."""
    b, t, h, d = q_BxTxHxD.shape
    heads = k_BxSxKxD.shape[2]
    q_BxTxKxGxD = (q_BxTxHxD * d**-0.5).reshape(b, t, heads, h // heads, d)
    scores = contract("btkgd,bskd->bkgts", q_BxTxKxGxD, k_BxSxKxD, dtype)
    weights = jax.nn.softmax(jnp.where(visible_TxS, scores, MASKED), axis=-1)
    return contract("bkgts,bskd->btkgd", weights, v_BxSxKxD, dtype).reshape(b, t, h, d)


def dense(q, k, v, causal: bool, window: int | None, dtype: str) -> jax.Array:
    """The plain formula over all T x T pairs."""
    positions = np.arange(q.shape[1])
    return attend(q, k, v, visible(positions, positions, causal, window), dtype)


def blockwise(q, k, v, causal: bool, window: int | None, dtype: str) -> jax.Array:
    """`dense` by blocks of 128 queries, each with the keys that one of its queries can see and no others."""
    t = q.shape[1]
    out = []
    for start in range(0, t, BLOCK):
        stop = min(start + BLOCK, t)
        first = 0 if window is None else max(0, start - window + 1)
        last = stop if causal else t if window is None else min(t, stop + window - 1)
        seen = visible(np.arange(start, stop), np.arange(first, last), causal, window)
        out.append(attend(q[:, start:stop], k[:, first:last], v[:, first:last], seen, dtype))
    return jnp.concatenate(out, axis=1)


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {"dense": dense, "blockwise": blockwise}


def dot_product_attention(
    q_BxTxHxD, k_BxTxKxD, v_BxTxKxD, *, causal: bool, window: int | None, dtype: str, implementation: str
):
    """Self-attention of a whole sequence, float32 [batch, length, heads, head_dim].

    window: None, or how many positions a query sees (see `visible`). dtype: what the operands of the two products are rounded
    to. implementation: a name in IMPLEMENTATIONS; they all compute the same function. Raises ValueError for another name.
    """
    run = choose(IMPLEMENTATIONS, implementation, "attention")
    return run(q_BxTxHxD, k_BxTxKxD, v_BxTxKxD, causal, window, dtype)
