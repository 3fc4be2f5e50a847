"""Token embeddings."""

from __future__ import annotations

import jax
from flax import nnx

from research.core.mesh import constrained
from research.nn.functional import Layer, param
from research.nn.products import matmul


def looked_up(table_VxC: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of a table: int32 [...] -> [..., width]. Each device has its rows of the table in full first: a table cut by columns
    would give rows cut by columns, which then had to change places with all devices."""
    return constrained(table_VxC, "vocab", None)[index]


class Embed(Layer):
    """A table [vocab, width]; int32 [...] -> float32 [..., width]. Starts normal with deviation `scale`."""

    def __init__(self, vocab: int, width: int, *, scale: float, rngs: nnx.Rngs):
        self.table = param(jax.random.normal(rngs.params(), (vocab, width)) * scale, "vocab", "embed")

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return looked_up(self.table[...], tokens)

    def logits(self, x: jax.Array, dtype: str) -> jax.Array:
        """The same table as output layer: [..., width] -> [..., vocab]."""
        return matmul(x, self.table[...].T, dtype)
