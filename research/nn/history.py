"""What the tokens up to a position say by themselves, for a model that adds it to the token's own embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from research.core.types import Spec
from research.nn.functional import Layer
from research.nn.induction import InductionEmbed, followed, followed_at
from research.nn.ngrams import NGramEmbed


class Recalled(NamedTuple):
    """embedding: float32 [batch, length, width]. followed: codes int32 [batch, length, orders of induction], 0 for none."""

    embedding: jax.Array
    followed: jax.Array


class History(Layer):
    """N-gram embeddings, induction embeddings, or both, whichever orders are given. Its cache is a buffer of token codes."""

    def __init__(self, ngrams: Sequence[int], bits: int, inner: int, induction: Sequence[int], vocab: int, width: int, *,
                 dtype: str, rngs: nnx.Rngs):  # fmt: skip
        self.ngrams = NGramEmbed(ngrams, bits, inner, width, dtype=dtype, rngs=rngs) if ngrams else None
        self.induction = InductionEmbed(induction, vocab, width, rngs=rngs) if induction else None
        self.orders, self.reach = tuple(induction), max(ngrams, default=1) - 1

    def _recalled(self, grams: jax.Array | None, found: Sequence[jax.Array], codes: jax.Array) -> Recalled:
        """`found`: what followed, an array an order."""
        codes_BxTxN = jnp.stack(found, axis=-1) if found else jnp.zeros((*codes.shape, 0), jnp.int32)
        parts = [] if grams is None else [grams]
        parts += [] if self.induction is None else [self.induction(codes_BxTxN)]
        return Recalled(sum(parts), codes_BxTxN)

    def __call__(self, tokens_BxT: jax.Array) -> Recalled:
        codes = tokens_BxT + 1
        grams = None if self.ngrams is None else self.ngrams(codes)
        return self._recalled(grams, [followed(codes, n) for n in self.orders], codes)

    def cache_specs(self, batch: int, context: int) -> Spec:
        """The codes of all positions for induction, else of the last few for n-grams."""
        if self.orders:
            return Spec((batch, context), jnp.int32, ("batch", "context"))
        return Spec((batch, self.reach), jnp.int32, ("batch", None))

    def decode(self, tokens_BxT: jax.Array, cache_BxS: jax.Array, index: jax.Array) -> tuple[Recalled, jax.Array]:
        """The same at positions index .. index + T - 1, and the cache after them."""
        codes, length = tokens_BxT + 1, tokens_BxT.shape[1]
        if not self.orders:
            both = jnp.concatenate([cache_BxS, codes], axis=1)
            return self._recalled(self.ngrams(both)[:, -length:], [], codes), both[:, length:]
        cache = jax.lax.dynamic_update_slice_in_dim(cache_BxS, codes, index, axis=1)
        grams = None
        if self.ngrams is not None:
            padded = jnp.pad(cache, [(0, 0), (self.reach, 0)])  # so that the slice may begin before the beginning
            recent = jax.lax.dynamic_slice_in_dim(padded, index, self.reach + length, axis=1)
            grams = self.ngrams(recent)[:, -length:]
        return self._recalled(grams, [followed_at(cache, n, index, length) for n in self.orders], codes), cache
