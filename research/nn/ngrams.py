"""What the last few tokens say by themselves: hashed n-gram embeddings, and what followed the same n-gram before.

Both read token codes: token + 1, so that 0 is "before the beginning", which is also what an empty cache holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from research.core.types import Spec
from research.nn.functional import param
from research.nn.linear import Linear

MIX = 0x9E3779B1  # 2^32 / golden ratio, odd (Knuth, The Art of Computer Programming, volume 3, section 6.4)


def shifted(x_BxT: jax.Array, by: int) -> jax.Array:
    """Each row moved right by `by`, zeros coming in."""
    return jnp.pad(x_BxT, [(0, 0), (by, 0)])[:, : x_BxT.shape[1]]


def hashes(codes_BxT: jax.Array, n: int) -> jax.Array:
    """uint32 [batch, length]: a hash of the n codes that end at each position, in order."""
    codes = codes_BxT.astype(jnp.uint32)
    mixed = jnp.zeros(codes.shape, jnp.uint32)
    for i in reversed(range(n)):
        mixed = (mixed + shifted(codes, i)) * jnp.uint32(MIX)
        mixed = mixed ^ (mixed >> 15)
    return mixed


class NGramEmbed(nnx.Module):
    """The sum over n in `orders` of a projected embedding of the last n tokens, by hash into 2^bits rows of `inner` numbers:
    codes int32 [batch, length] -> float32 [batch, length, width]. Rows are shared by what collides."""

    def __init__(self, orders: Sequence[int], bits: int, inner: int, width: int, *, dtype: str, rngs: nnx.Rngs):
        def table() -> nnx.Param:
            return param(jax.random.normal(rngs.params(), (1 << bits, inner)) * 0.1, "vocab", None)

        self.tables = nnx.Dict({str(n): table() for n in orders})
        self.project = Linear(len(orders) * inner, width, (None, "embed"), dtype=dtype, rngs=rngs)
        self.orders, self.bits = tuple(orders), bits

    def __call__(self, codes_BxT: jax.Array) -> jax.Array:
        rows = [(hashes(codes_BxT, n) >> (32 - self.bits)).astype(jnp.int32) for n in self.orders]
        found = [self.tables[str(n)][...][row] for n, row in zip(self.orders, rows, strict=True)]
        return self.project(jnp.concatenate(found, axis=-1))


def followed(codes_BxT: jax.Array, n: int) -> jax.Array:
    """int32 [batch, length]: the code that followed the latest earlier occurrence of the last n codes; 0 where there is none.

    An induction head (Olsson et al. 2022, arXiv 2209.11895), wired by hand. N-grams are compared by 32-bit hash, and sorted, so
    it takes length x log(length). What it gives at a position depends on that position and those before it alone.
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
    same_BxTxS = (hash_BxT[:, :, None] == hash_BxS[:, None, :]) & possible_TxS
    latest_BxT = jnp.max(jnp.where(same_BxTxS, earlier_S, -1), axis=-1)
    after = jnp.take_along_axis(codes_BxS, jnp.maximum(latest_BxT, 0) + 1, axis=1, mode="clip")
    return jnp.where(latest_BxT >= 0, after, 0)


class InductionEmbed(nnx.Module):
    """The sum over n in `orders` of an embedding of the token that `followed`, or of there being none:
    codes int32 [batch, length] -> float32 [batch, length, width]."""

    def __init__(self, orders: Sequence[int], vocab: int, width: int, *, rngs: nnx.Rngs):
        def table() -> nnx.Param:
            return param(jax.random.normal(rngs.params(), (vocab + 1, width)) * 0.1, None, "embed")

        self.tables = nnx.Dict({str(n): table() for n in orders})
        self.orders = tuple(orders)

    def __call__(self, codes_BxT: jax.Array) -> jax.Array:
        return sum(self.tables[str(n)][...][followed(codes_BxT, n)] for n in self.orders)

    def decode(self, codes_BxS: jax.Array, index: jax.Array, length: int) -> jax.Array:
        """At positions index .. index + length - 1 of a buffer."""
        return sum(self.tables[str(n)][...][followed_at(codes_BxS, n, index, length)] for n in self.orders)


class History(nnx.Module):
    """Embeddings of what the tokens before and at a position are: a token's own, plus those of n-grams and of induction where
    given. Its cache is a buffer of codes."""

    def __init__(self, ngrams: NGramEmbed | None, induction: InductionEmbed | None):
        self.ngrams, self.induction = ngrams, induction

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        codes = tokens_BxT + 1
        return sum(part(codes) for part in (self.ngrams, self.induction) if part is not None)

    def cache_specs(self, batch: int, context: int) -> Spec:
        """The codes of all positions for induction, else of the last few for n-grams."""
        if self.induction is not None:
            return Spec((batch, context), jnp.int32, ("batch", "context"))
        return Spec((batch, max(self.ngrams.orders) - 1), jnp.int32, ("batch", None))

    def decode(self, tokens_BxT: jax.Array, cache_BxS: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The same at positions index .. index + T - 1, and the cache after them."""
        codes, length = tokens_BxT + 1, tokens_BxT.shape[1]
        if self.induction is None:
            both = jnp.concatenate([cache_BxS, codes], axis=1)
            return self.ngrams(both)[:, -length:], both[:, length:]
        cache = jax.lax.dynamic_update_slice_in_dim(cache_BxS, codes, index, axis=1)
        found = self.induction.decode(cache, index, length)
        if self.ngrams is None:
            return found, cache
        reach = max(self.ngrams.orders) - 1
        padded = jnp.pad(cache, [(0, 0), (reach, 0)])  # so that the slice may begin before the beginning
        recent = jax.lax.dynamic_slice_in_dim(padded, index, reach + length, axis=1)
        return found + self.ngrams(recent)[:, -length:], cache
