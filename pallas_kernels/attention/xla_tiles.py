"""What is done with one row of blocks: the arithmetic of attention forward and backward, with which any list is gone through.

Online softmax as in FlashAttention (Dao et al. 2022, arXiv 2205.14135, algorithms 1 and 4). With S the scores and
P = exp(S - lse):  dV = P' dO,  dS = P * (dO V' - delta),  dQ = dS K,  dK = dS' Q,  where delta = rowsum(dO * O) - d lse.

N counts the key heads that are computed together, times the rows if those are several; M the queries of all heads that share
one.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from pallas_kernels.attention.algebra import Mask


class Where(NamedTuple):
    """Indices of scores: arrays that broadcast to their shape. Segments likewise, or None. kv_len: where the keys end, or None
    if none of the blocks reaches beyond it."""

    batch: Any
    head: Any
    q: Any
    kv: Any
    kv_len: int | None
    q_segment: Any = None
    kv_segment: Any = None


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a score is and which are seen; all of it known before anything runs. score_mod: of single scores, its arrays
    hoisted."""

    mask: Mask
    scale: float  # of products; what is exact to scale beforehand, queries have in them
    softcap: float | None
    score_mod: Any  # a Jaxpr (score, batch, head, q_index, kv_index) -> score, its constants hoisted
    inexact: tuple[bool, ...]  # which of these constants have gradients

    def score(self, raw: jax.Array, where: Where, floats: list[jax.Array], others: list[jax.Array]) -> jax.Array:
        """Scores of products q k', in any order of axes in which `where` is."""
        score = raw if self.scale == 1 else raw * self.scale
        if self.softcap is not None:
            score = self.softcap * jnp.tanh(score / self.softcap)
        if self.score_mod is not None:
            left = iter(floats), iter(others)
            single = jaxpr_as_fun(ClosedJaxpr(self.score_mod, [next(left[0 if yes else 1]) for yes in self.inexact]))
            score = jnp.vectorize(lambda *args: single(*args)[0])(score, where.batch, where.head, where.q, where.kv)
        return score

    def seen(self, where: Where, valid: Any) -> jax.Array:
        """bool, to be broadcast against the scores. valid: likewise, of what is no padding of the list; or None."""
        seen = self.mask(where.batch, where.head, where.q, where.kv)
        if where.kv_len is not None:
            seen = seen & (where.kv < where.kv_len)
        if where.q_segment is not None:
            seen = seen & (where.q_segment == where.kv_segment)
        return seen if valid is None else seen & valid.reshape((1,) * (seen.ndim - valid.ndim) + valid.shape)


def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum whose operands have the lower of the two dtypes, summed in float32 at least."""
    low = min(a.dtype, b.dtype, key=lambda dtype: jnp.finfo(dtype).bits)
    precise = jnp.promote_types(low, jnp.float32)
    return jnp.einsum(spec, a.astype(low), b.astype(low), preferred_element_type=precise, precision="highest")


class Sums(NamedTuple):
    """Of the keys so far: the greatest score and the sum of weights [N, M, 1], the weighted sum of values [N, M, d_v]."""

    top: jax.Array
    total: jax.Array
    values: jax.Array


def forward(
    sums: Sums | None, q_NxMxD, k_NxKxD, v_NxKxD, rule: Rule, where: Where, constants, apart, masked: bool, valid
) -> Sums:
    """Adds keys. apart: the shape that N and M are put apart to, where `where` and `valid` are for scores [*apart, keys].
    masked: whether all of them are seen by all queries (False), or the mask has to be asked."""
    raw = product("nmd,nkd->nmk", q_NxMxD, k_NxKxD)
    score = rule.score(raw.reshape(*apart, -1), where, *constants)
    if masked:
        score = jnp.where(rule.seen(where, valid), score, -jnp.inf)
    score = score.reshape(raw.shape)
    top = score.max(axis=-1, keepdims=True)
    if sums is not None:
        top = jnp.maximum(sums.top, top)
    finite = jnp.where(top == -jnp.inf, 0, top)  # nothing seen so far
    weight = jnp.exp(score - finite)
    total, values = weight.sum(axis=-1, keepdims=True), product("nmk,nkd->nmd", weight, v_NxKxD)
    if sums is not None:
        fade = jnp.exp(sums.top - finite)
        total, values = total + fade * sums.total, values + fade * sums.values
    return Sums(top, total, values)


def finished(sums: Sums) -> tuple[jax.Array, jax.Array]:
    """(out [N, M, d_v], lse [N, M]): 0 and -inf where nothing was seen."""
    none = sums.total == 0
    total = jnp.where(none, 1, sums.total)
    lse = jnp.where(none, -jnp.inf, jnp.where(none, 0, sums.top) + jnp.log(total))
    return sums.values / total, lse[..., 0]


class Rows(NamedTuple):
    """Queries beside a row of keys: q [N, M, d_qk], the gradient of out [N, M, d_v], lse and delta [N, 1, M]."""

    q: jax.Array
    d_out: jax.Array
    lse: jax.Array
    delta: jax.Array


def backward(rows: Rows, k_NxKxD, k_NxDxK, v_NxKxD, rule: Rule, where: Where, constants, apart, masked: bool, valid):
    """(dK, dV, dQ transposed [N, d, M], gradients of floats) of some keys and queries, all finite: what was not is zero here,
    and has made the lse of who sees it NaN.

    Scores are [N, keys, M] here, and the keys are given turned round as well: no product then has to turn an operand. apart:
    the shape that scores are put apart to, for which `where` and `valid` are.
    """
    raw = product("nkd,nmd->nkm", k_NxKxD, rows.q)
    floats, others = constants

    def scores(raw: jax.Array, floats: list[jax.Array]) -> jax.Array:
        return rule.score(raw.reshape(apart), where, floats, others).reshape(raw.shape)

    score, pull = jax.vjp(scores, raw, floats)
    weight = jnp.exp(score - rows.lse)
    d_score = weight * (product("nkd,nmd->nkm", v_NxKxD, rows.d_out) - rows.delta)
    if masked:
        seen = jnp.broadcast_to(rule.seen(where, valid), apart).reshape(raw.shape)
        weight, d_score = jnp.where(seen, weight, 0), jnp.where(seen, d_score, 0)
    d_raw, d_floats = pull(d_score)
    d_v = product("nkm,nmd->nkd", weight, rows.d_out)
    d_k = product("nkm,nmd->nkd", d_raw, rows.q)
    return d_k, d_v, product("ndk,nkm->ndm", k_NxDxK, d_raw), d_floats
