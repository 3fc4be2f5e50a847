"""Attention over the slots of a rolling cache, whose keys lie in no order of positions, which no kernel knows.

Softmax is float32. Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245): H query heads share K key heads, H % K ==
0, query head h reading key head h // (H / K).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.attention.algebra import Mask
from research.nn.products import contract

MASKED = -1e30  # finite: a row that sees nothing gives the mean of all values, and no NaN


def visible(mask: Mask, query_T, key_S):
    """bool [T, S]: does the query at position query_T[t] see the key at key_S[s]? Negative key positions are empty slots. The
    mask is one for all heads."""
    return mask(0, 0, query_T[:, None], key_S[None, :]) & (key_S[None, :] >= 0)


def attend(q_BxTxHxD, k_BxSxKxD, v_BxSxKxD, visible_TxS, dtype: str) -> jax.Array:
    """softmax(q k / sqrt(D)) v over the visible keys (Vaswani et al. 2017, arXiv 1706.03762, eq. 1): float32 [B, T, H, D].

    The queries of a group of heads that share a key head stand one after another, as if of one longer sequence.
    """
    b, t, h, d = q_BxTxHxD.shape
    heads = k_BxSxKxD.shape[2]
    q = q_BxTxHxD.reshape(b, t, heads, -1, d).transpose(0, 2, 3, 1, 4).reshape(b * heads, -1, d)
    k, v = (x.swapaxes(1, 2).reshape(b * heads, -1, d) for x in (k_BxSxKxD, v_BxSxKxD))
    scores = contract("ntd,nsd->nts", q * d**-0.5, k, dtype)
    seen = jnp.tile(visible_TxS, (h // heads, 1))[None]
    weights = jax.nn.softmax(jnp.where(seen, scores, MASKED), axis=-1)
    out = contract("nts,nsd->ntd", weights, v, dtype)
    return out.reshape(b, heads, -1, t, d).transpose(0, 3, 1, 2, 4).reshape(b, t, h, d)
