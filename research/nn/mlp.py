"""Feed-forward layers of a transformer block."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from research.nn.functional import Layer
from research.nn.linear import Linear


def squared_relu(x: jax.Array) -> jax.Array:
    """max(x, 0)^2 (So et al. 2021, arXiv 2109.08668)."""
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS = {"relu": jax.nn.relu, "squared_relu": squared_relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu, "tanh": jnp.tanh}


class FeedForward(Layer):
    """down(activation(up(x))): [..., width] -> [..., width]."""

    def __init__(self, width: int, hidden: int, activation: str, *, dtype: str, out_init: str, rngs: nnx.Rngs):
        self.up = Linear(width, hidden, ("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, width, ("mlp", "embed"), dtype=dtype, init=out_init, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class SwiGLU(Layer):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202, eq. 6)."""

    def __init__(self, width: int, hidden: int, *, dtype: str, out_init: str, rngs: nnx.Rngs):
        self.gate = Linear(width, hidden, ("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.up = Linear(width, hidden, ("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, width, ("mlp", "embed"), dtype=dtype, init=out_init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


MLPS = ("gelu", "relu", "silu", "squared_relu", "swiglu")


def feed_forward(kind: str, width: int, hidden: int, *, dtype: str, out_init: str, rngs: nnx.Rngs) -> nnx.Module:
    """The layer that `kind`, one of MLPS, names."""
    if kind == "swiglu":
        return SwiGLU(width, hidden, dtype=dtype, out_init=out_init, rngs=rngs)
    return FeedForward(width, hidden, kind, dtype=dtype, out_init=out_init, rngs=rngs)
