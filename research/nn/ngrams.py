"""What the last few tokens say by themselves: embeddings of hashed n-grams.

They read token codes: token + 1, so that 0 is "before the beginning", which is also what an empty cache holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from research.nn.embed import looked_up
from research.nn.functional import Layer, param
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


class NGramEmbed(Layer):
    """The sum over n in `orders` of a projected embedding of the last n tokens, by hash into 2^bits rows of `inner` numbers:
    codes int32 [batch, length] -> float32 [batch, length, width]. Rows are shared by what collides."""

    def __init__(self, orders: Sequence[int], bits: int, inner: int, width: int, *, dtype: str, rngs: nnx.Rngs):
        def table() -> nnx.Param:
            return param(jax.random.normal(rngs.params(), (1 << bits, inner)) * 0.1, "vocab", "embed")

        self.tables = nnx.Dict({str(n): table() for n in orders})
        self.project = Linear(len(orders) * inner, width, (None, "embed"), dtype=dtype, rngs=rngs)
        self.orders, self.bits = tuple(orders), bits

    def __call__(self, codes_BxT: jax.Array) -> jax.Array:
        rows = [(hashes(codes_BxT, n) >> (32 - self.bits)).astype(jnp.int32) for n in self.orders]
        found = [looked_up(self.tables[str(n)][...], row) for n, row in zip(self.orders, rows, strict=True)]
        return self.project(jnp.concatenate(found, axis=-1))
