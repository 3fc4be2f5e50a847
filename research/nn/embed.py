"""Token embeddings."""

from __future__ import annotations

import jax
from flax import nnx

from research.nn.functional import Layer, param
from research.nn.products import matmul


class Embed(Layer):
    """A table [vocab, width]; int32 [...] -> float32 [..., width]. Starts normal with deviation `scale`."""

    def __init__(self, vocab: int, width: int, *, scale: float, rngs: nnx.Rngs):
        self.table = param(jax.random.normal(rngs.params(), (vocab, width)) * scale, "vocab", "embed")

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.table[...][tokens]

    def logits(self, x: jax.Array, dtype: str) -> jax.Array:
        """The same table as output layer: [..., width] -> [..., vocab]."""
        return matmul(x, self.table[...].T, dtype)
