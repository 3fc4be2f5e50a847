"""What followed the last few tokens when they last occurred: induction heads wired by hand (Olsson et al. 2022, 2209.11895).

They read token codes, as `nn.ngrams` does: 0 is "before the beginning", and here also "never occurred".
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from research.nn.embed import looked_up
from research.nn.functional import Layer, param
from research.nn.linear import Linear, per_channel
from research.nn.ngrams import hashes


def followed(codes_BxT: jax.Array, n: int) -> jax.Array:
    """int32 [batch, length]: the code that followed the latest earlier occurrence of the last n codes; 0 where there is none.

    N-grams are compared by 32-bit hash, and sorted, so it takes length x log(length). What it gives at a position depends on
    that position and those before it alone.
    """

    def one(codes_T: jax.Array, hash_T: jax.Array) -> jax.Array:
        length = codes_T.shape[0]
        order = jnp.argsort(hash_T, stable=True)  # equal hashes side by side, by position
        ranked = hash_T[order]
        same = jnp.concatenate([jnp.array([False]), ranked[1:] == ranked[:-1]])
        before = jnp.where(same, jnp.roll(order, 1), -1)
        earlier = jnp.zeros(length, order.dtype).at[order].set(before)
        # n-grams that reach before the beginning are no occurrence
        found = (earlier >= n - 1) & (jnp.arange(length) >= n - 1)
        return jnp.where(found, codes_T[jnp.minimum(earlier + 1, length - 1)], 0)

    return jax.vmap(one)(codes_BxT, hashes(codes_BxT, n))


def followed_at(codes_BxS: jax.Array, n: int, index: jax.Array, length: int) -> jax.Array:
    """`followed` at positions index .. index + length - 1 of a buffer that is filled up to there: int32 [batch, length]."""
    hash_BxS = hashes(codes_BxS, n)
    hash_BxT = jax.lax.dynamic_slice_in_dim(hash_BxS, index, length, axis=1)
    position_T, earlier_S = index + jnp.arange(length), jnp.arange(codes_BxS.shape[1])
    possible_TxS = (earlier_S[None] < position_T[:, None]) & (earlier_S[None] >= n - 1) & (position_T[:, None] >= n - 1)
    same_BxTxS = (hash_BxT[:, :, None] == hash_BxS[:, None, :]) & possible_TxS[None]
    latest_BxT = jnp.max(jnp.where(same_BxTxS, earlier_S[None, None], -1), axis=-1)
    after = jnp.take_along_axis(codes_BxS, jnp.maximum(latest_BxT, 0) + 1, axis=1, mode="clip")
    return jnp.where(latest_BxT >= 0, after, 0)


class InductionEmbed(Layer):
    """The sum over `orders` of an embedding of the code that `followed`:
    int32 [batch, length, orders] -> float32 [batch, length, width]."""

    def __init__(self, orders: Sequence[int], vocab: int, width: int, *, rngs: nnx.Rngs):
        def table() -> nnx.Param:
            return param(jax.random.normal(rngs.params(), (vocab + 1, width)) * 0.1, None, "embed")

        self.tables = nnx.Dict({str(n): table() for n in orders})
        self.orders = tuple(orders)

    def __call__(self, followed_BxTxN: jax.Array) -> jax.Array:
        return sum(looked_up(self.tables[str(n)][...], followed_BxTxN[..., i]) for i, n in enumerate(self.orders))


class CopyHead(Layer):
    """Each order votes, in the logits, for the code that it says `followed`, as strongly as a gate read off the last hidden
    state says: a pointer beside the vocabulary (Gu et al. 2016, arXiv 1603.06393; See et al. 2017, arXiv 1704.04368), in
    logits.

    (logits [batch, length, vocab], hidden [batch, length, width], codes int32 [batch, length, orders]) -> logits.
    """

    def __init__(self, orders: int, width: int, *, dtype: str, rngs: nnx.Rngs):
        self.gate = Linear(width, orders, ("embed", None), dtype=dtype, init="zeros", rngs=rngs)
        self.bias = param(jnp.full((orders,), 0.3), None)

    def __call__(self, logits_BxTxV: jax.Array, hidden_BxTxC: jax.Array, followed_BxTxN: jax.Array) -> jax.Array:
        votes_BxTxN = self.gate(hidden_BxTxC)
        votes_BxTxN = votes_BxTxN + per_channel(self.bias[...], votes_BxTxN)
        # a column more for what never occurred, dropped again
        by_code = jnp.pad(logits_BxTxV, [(0, 0), (0, 0), (1, 0)])
        row = jnp.arange(logits_BxTxV.shape[0])[:, None, None]
        column = jnp.arange(logits_BxTxV.shape[1])[None, :, None]
        return by_code.at[row, column, followed_BxTxN].add(votes_BxTxN)[..., 1:]
