"""A multi-layer perceptron."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from flax import nnx

from research.core.names import choose
from research.nn import checks
from research.nn.functional import Functional, Layer, functional
from research.nn.linear import KERNELS, Linear
from research.nn.mlp import ACTIVATIONS
from research.nn.products import DTYPES


class MLP(Layer):
    """float32 [batch, ...] -> [batch, outputs]."""

    def __init__(self, inputs: int, outputs: int, hidden: Sequence[int], activation: str, residual: bool, dropout: float,
                 init: str, dtype: str, rngs: nnx.Rngs):  # fmt: skip
        widths = [inputs, *hidden]
        self.layers = nnx.List(
            [Linear(a, b, ("embed", "mlp"), bias=True, init=init, dtype=dtype, rngs=rngs) for a, b in zip(widths, widths[1:])]
        )
        self.head = Linear(widths[-1], outputs, ("embed", None), bias=True, init=init, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None
        self.activation, self.residual = activation, residual

    def hidden(self, x: jax.Array) -> jax.Array:
        """What the output layer reads."""
        x = x.reshape(x.shape[0], -1)
        for i, layer in enumerate(self.layers):
            y = ACTIVATIONS[self.activation](layer(x))
            y = y if self.dropout is None else self.dropout(y)
            x = x + y if self.residual and i and x.shape == y.shape else y
        return x

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.hidden(x))


def mlp(
    *,
    shape: Sequence[int],
    outputs: int,
    hidden: Sequence[int],
    activation: str,
    residual: bool,
    dropout: float,
    init: str,
    dtype: str,
) -> Functional:
    """A multi-layer perceptron, float32 [batch, *shape] (flattened) -> [batch, outputs]; linear where `hidden` is empty.

    residual: add a hidden layer's input to its output where the widths agree, from the second layer on.
    init: normal, he_normal or uniform (PyTorch's). Raises ValueError, naming the config's key, for sizes that cannot work.
    """
    checks.positive("model.outputs", outputs)
    for width in (*shape, *hidden):
        checks.positive("model.hidden and model.shape: each", width)
    checks.fraction("model.dropout", dropout)
    choose(ACTIVATIONS, activation, "model.activation")
    choose(KERNELS, init, "model.init")
    choose(DTYPES, dtype, "model.dtype")
    return functional(
        lambda rngs: MLP(math.prod(shape), outputs, tuple(hidden), activation, residual, dropout, init, dtype, rngs)
    )
