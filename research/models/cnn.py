"""A small convolutional network of images."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from research.core.names import choose
from research.nn import checks
from research.nn.conv import CONVOLUTIONS, Conv
from research.nn.functional import Functional, Layer, functional
from research.nn.linear import Linear
from research.nn.norms import GroupNorm
from research.nn.products import DTYPES

NORMALIZATIONS = ("batch", "group", "none")
GROUP = 16  # channels normalized together, or all of them where they are fewer


def _normalization(kind: str, width: int, rngs: nnx.Rngs) -> nnx.Module | None:
    if kind == "batch":
        return nnx.BatchNorm(width, momentum=0.9, epsilon=1e-5, rngs=rngs)
    return GroupNorm(width, max(1, width // GROUP), rngs=rngs) if kind == "group" else None


class ConvBlock(Layer):
    """relu(norm(conv 3 x 3)), the input added where `residual` and the widths agree."""

    def __init__(self, inputs: int, outputs: int, normalization: str, residual: bool, dtype: str, implementation: str,
                 rngs: nnx.Rngs):  # fmt: skip
        self.norm = _normalization(normalization, outputs, rngs)
        self.conv = Conv(inputs, outputs, space=2, window=3, stride=1, padding=1, bias=self.norm is None, init="he_normal",
                         dtype=dtype, implementation=implementation, rngs=rngs)  # fmt: skip
        self.residual = residual and inputs == outputs

    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        y = self.conv(x_BxHxWxC)
        y = jax.nn.relu(y if self.norm is None else self.norm(y))
        return x_BxHxWxC + y if self.residual else y


def halved(x_BxHxWxC: jax.Array) -> jax.Array:
    """The maximum of every 2 x 2; an odd last row or column is left out. By a reshape: XLA's window reduction is slow backward
    on CPU."""
    b, h, w, c = x_BxHxWxC.shape
    return x_BxHxWxC[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))


class CNN(Layer):
    """float32 [batch, height, width, channels] -> [batch, outputs]."""

    def __init__(self, channels: int, outputs: int, widths: Sequence[int], blocks: int, normalization: str, residual: bool,
                 dropout: float, dtype: str, implementation: str, rngs: nnx.Rngs):  # fmt: skip
        stages, last = [], channels
        for width in widths:
            ins = [last] + [width] * (blocks - 1)
            stages.append(nnx.List([ConvBlock(n, width, normalization, residual, dtype, implementation, rngs) for n in ins]))
            last = width
        self.stages = nnx.List(stages)
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None
        self.head = Linear(last, outputs, ("embed", None), bias=True, dtype=dtype, rngs=rngs)

    def hidden(self, x_BxHxWxC: jax.Array) -> jax.Array:
        """What the output layer reads: the mean over space, [batch, last width]."""
        x = x_BxHxWxC
        for i, stage in enumerate(self.stages):
            x = halved(x) if i else x
            for block in stage:
                x = block(x)
        x = jnp.mean(x, axis=(1, 2))
        return x if self.dropout is None else self.dropout(x)

    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        return self.head(self.hidden(x_BxHxWxC))


def cnn(
    *,
    shape: Sequence[int],
    outputs: int,
    widths: Sequence[int],
    blocks: int,
    normalization: str,
    residual: bool,
    dropout: float,
    dtype: str,
    convolution: str,
) -> Functional:
    """A small CNN, float32 [batch, *shape] -> [batch, outputs]; shape: (height, width, channels).

    A stage a width, of `blocks` 3 x 3 convolutions each followed by normalization and relu; 2 x 2 maximum pooling between
    stages, the mean over space at the end, dropout, a linear layer. normalization: batch (running statistics in state), group,
    or none. convolution: see `nn.conv.Conv`. Raises ValueError, naming the config's key, for what cannot be.
    """
    if len(shape) != 3:
        raise ValueError(f"cnn reads inputs of shape [height, width, channels], not {list(shape)}")
    if not widths:
        raise ValueError("model.widths=[] must name the width of at least one stage")
    for width in widths:
        checks.positive("model.widths: each", width)
    if normalization == "group":
        for width in widths:
            checks.divisible("model.widths: each", width, "a group of normalization=group", min(GROUP, width))
    checks.positive("model.blocks", blocks)
    checks.positive("model.outputs", outputs)
    checks.fraction("model.dropout", dropout)
    smallest = min(shape[:2]) >> (len(widths) - 1)
    if not smallest:
        raise ValueError(
            f"model.widths={list(widths)} halves {shape[0]} x {shape[1]} inputs away; at most {min(shape[:2]).bit_length()}"
        )
    choose(dict.fromkeys(NORMALIZATIONS), normalization, "model.normalization")
    choose(DTYPES, dtype, "model.dtype")
    choose(CONVOLUTIONS, convolution, "model.convolution")
    return functional(
        lambda rngs: CNN(shape[2], outputs, tuple(widths), blocks, normalization, residual, dropout, dtype, convolution, rngs)
    )
