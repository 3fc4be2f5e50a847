"""A recurrent classifier of sequences."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from research.core.names import choose
from research.nn import checks
from research.nn.functional import Functional, Layer, functional
from research.nn.gru import GRU
from research.nn.linear import KERNELS, Linear
from research.nn.products import DTYPES

READOUTS = ("all", "last")


class Recurrent(Layer):
    """float32 [batch, length] or [batch, length, features] -> [batch, outputs]."""

    def __init__(self, length: int, features: int, outputs: int, hidden: int, layers: int, bidirectional: bool, readout: str,
                 init: str, dtype: str, unroll: int, rngs: nnx.Rngs):  # fmt: skip
        self.readout = readout
        directions = (False, True) if bidirectional else (False,)
        width, stacked = features, []
        for _ in range(layers):
            stacked.append(
                nnx.List([GRU(width, hidden, reverse=r, init=init, dtype=dtype, unroll=unroll, rngs=rngs) for r in directions])
            )
            width = hidden * len(directions)
        self.layers = nnx.List(stacked)
        rows = width * length if readout == "all" else width
        self.head = Linear(rows, outputs, ("embed", None), bias=True, init=init, dtype=dtype, rngs=rngs)

    def hidden(self, x: jax.Array) -> jax.Array:
        """What the output layer reads."""
        x_BxTxC = x.reshape(*x.shape[:2], -1)
        for directions in self.layers:
            x_BxTxC = jnp.concatenate([gru(x_BxTxC) for gru in directions], axis=-1)
        if self.readout == "all":
            return x_BxTxC.reshape(x.shape[0], -1)
        width = x_BxTxC.shape[-1] // len(self.layers[-1])  # the last state of each direction: the first position, going back
        ends = [x_BxTxC[:, 0 if gru.reverse else -1, i * width : (i + 1) * width] for i, gru in enumerate(self.layers[-1])]
        return jnp.concatenate(ends, axis=-1)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.hidden(x))


def gru(
    *,
    shape: Sequence[int],
    outputs: int,
    hidden: int,
    layers: int,
    bidirectional: bool,
    readout: str,
    init: str,
    dtype: str,
    unroll: int,
) -> Functional:
    """A GRU over the first axis of float32 [batch, *shape] -> [batch, outputs]. shape: (length,) or (length, features).

    readout: the output layer reads "all" states or the "last" one (of each direction). init: normal, he_normal or uniform
    (PyTorch's). unroll: steps of time in one iteration of the loop. Raises ValueError, naming the config's key, for what cannot
    be.
    """
    if len(shape) not in (1, 2):
        raise ValueError(f"gru reads inputs of shape [length] or [length, features], not {list(shape)}")
    for name, value in {"outputs": outputs, "hidden": hidden, "layers": layers, "unroll": unroll}.items():
        checks.positive(f"model.{name}", value)
    choose(dict.fromkeys(READOUTS), readout, "model.readout")
    choose(KERNELS, init, "model.init")
    choose(DTYPES, dtype, "model.dtype")
    length, features = shape[0], shape[1] if len(shape) == 2 else 1
    return functional(
        lambda rngs: Recurrent(length, features, outputs, hidden, layers, bidirectional, readout, init, dtype, unroll, rngs)
    )
