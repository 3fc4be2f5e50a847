"""The specification: dense attention in float32 (float64 for float64 operands), differentiated by JAX.

    score = scale * q k';  score = softcap * tanh(score / softcap);  score = score_mod(score, batch, head, q_index, kv_index)
    weight = exp(score - lse) where the query sees the key, 0 elsewhere;  out = weight v
    lse = log(sum of exp(score) over the keys that are seen, and exp(sink) of the head)

A key that a query does not see has no influence on what the query gets, nor gradients from it, whatever the key holds. One
that is seen and not finite makes it NaN. A query that sees nothing gets 0, and lse -inf where its head has no sink.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.attention.block_mask import SelectedBlocks, inner


def attend(q, k, v, mask, *, q_offset, score_mod, segment_ids, sinks, softcap, scale):
    """(out [batch, q_len, q_heads, d_v], lse [batch, q_len, q_heads] in the dtype of sums). Arguments: see
    `sparse_attention`."""
    b, t, h, _ = q.shape
    s, dtype = k.shape[1], jnp.promote_types(q.dtype, jnp.float32)
    k_BxSxHxD, v_BxSxHxD = (jnp.repeat(x.astype(dtype), h // k.shape[2], axis=2) for x in (k, v))
    finite_BxSxH = jnp.isfinite(k_BxSxHxD).all(-1) & jnp.isfinite(v_BxSxHxD).all(-1)
    k_BxSxHxD, v_BxSxHxD = (jnp.where(jnp.isfinite(x), x, 0) for x in (k_BxSxHxD, v_BxSxHxD))
    score = scale * jnp.einsum("bthd,bshd->bhts", q.astype(dtype), k_BxSxHxD, precision="highest")
    if softcap is not None:
        score = softcap * jnp.tanh(score / softcap)
    index = [jnp.arange(n).reshape([-1 if i == axis else 1 for i in range(4)]) for axis, n in enumerate((b, h, t, s))]
    index[2] = index[2] + jnp.reshape(q_offset, (-1, 1, 1, 1))
    if score_mod is not None:
        score = jnp.vectorize(score_mod)(score, *index)
    score = score + jnp.where(finite_BxSxH, 0, jnp.nan).swapaxes(1, 2)[:, :, None]
    seen = visible(mask, *index, q_offset)
    if segment_ids is not None:
        seen = seen & (segment_ids.q[:, None, :, None] == segment_ids.kv[:, None, None, :])
    score = jnp.where(seen, score, -jnp.inf)
    top = jnp.full((b, h, t, 1), -jnp.inf, dtype) if sinks is None else jnp.broadcast_to(sinks[:, None, None], (b, h, t, 1))
    lse = jax.nn.logsumexp(jnp.concatenate([score, top.astype(dtype)], axis=-1), axis=-1, keepdims=True)
    weight = jnp.where(seen, jnp.exp(score - jnp.where(lse == -jnp.inf, 0, lse)), 0)
    out = jnp.einsum("bhts,bshd->bthd", weight, v_BxSxHxD, precision="highest")
    return out.astype(q.dtype), lse[..., 0].swapaxes(1, 2)


def visible(mask, batch, head, q_index, kv_index, q_offset):
    """bool of the broadcast shape of the indices; q_index counts from q_offset."""
    seen = inner(mask)(batch, head, q_index, kv_index)
    if not isinstance(mask, SelectedBlocks):
        return seen
    row = (q_index - jnp.reshape(q_offset, (-1, 1, 1, 1))) // mask.q_block
    index = jnp.repeat(mask.index, head.size // mask.index.shape[1], axis=1)  # [batch or 1, heads, rows, count]
    chosen = jnp.take_along_axis(index, row[0].reshape(1, 1, -1, 1), axis=2)
    inside = (chosen[..., None, :] == (kv_index // mask.kv_block)[..., None]).any(-1)
    return inside & seen
