"""A small convolutional network of series."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import nnx

from research.core.names import choose
from research.nn import checks
from research.nn.conv import CONVOLUTIONS, Conv
from research.nn.functional import Functional, Layer, functional
from research.nn.linear import KERNELS, Linear
from research.nn.products import DTYPES


class SeriesCNN(Layer):
    """float32 [batch, length] or [batch, length, channels] -> [batch, outputs]: strided convolutions, relu, then a linear
    layer on all positions."""

    def __init__(self, length: int, channels: int, outputs: int, widths: Sequence[int], windows: Sequence[int], stride: int,
                 padding: int, init: str, dtype: str, implementation: str, rngs: nnx.Rngs):  # fmt: skip
        layers = []
        for width, window in zip(widths, windows, strict=True):
            layers.append(
                Conv(
                    channels,
                    width,
                    space=1,
                    window=window,
                    stride=stride,
                    padding=padding,
                    bias=True,
                    init=init,
                    dtype=dtype,
                    implementation=implementation,
                    rngs=rngs,
                )  # fmt: skip
            )
            length, channels = (length + 2 * padding - window) // stride + 1, width
        self.layers = nnx.List(layers)
        self.head = Linear(length * channels, outputs, ("embed", None), bias=True, init=init, dtype=dtype, rngs=rngs)

    def hidden(self, x: jax.Array) -> jax.Array:
        """What the output layer reads."""
        x_BxTxC = x.reshape(*x.shape[:2], -1)
        for conv in self.layers:
            x_BxTxC = jax.nn.relu(conv(x_BxTxC))
        return x_BxTxC.reshape(x.shape[0], -1)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.hidden(x))


def series_cnn(
    *,
    shape: Sequence[int],
    outputs: int,
    widths: Sequence[int],
    windows: Sequence[int],
    stride: int,
    padding: int,
    init: str,
    dtype: str,
    convolution: str,
) -> Functional:
    """A CNN of series, float32 [batch, *shape] -> [batch, outputs]; shape: (length,) or (length, channels).

    A convolution a width, of the window at the same place in `windows`, all of one stride and padding. init: normal, he_normal
    or uniform (PyTorch's). convolution: see `nn.conv.Conv`. Raises ValueError, naming the config's key, for what cannot be.
    """
    if len(shape) not in (1, 2):
        raise ValueError(f"series_cnn reads inputs of shape [length] or [length, channels], not {list(shape)}")
    if len(widths) != len(windows) or not widths:
        raise ValueError(f"model.widths={list(widths)} and model.windows={list(windows)} must name one each for every layer")
    for name, value in {"outputs": outputs, "stride": stride}.items():
        checks.positive(f"model.{name}", value)
    length = shape[0]
    for width, window in zip(widths, windows, strict=True):
        checks.positive("model.widths: each", width)
        checks.positive("model.windows: each", window)
        if window > length + 2 * padding:
            raise ValueError(
                f"model.windows={list(windows)}: {window} does not fit {length} positions + 2 x model.padding={padding}"
            )
        length = (length + 2 * padding - window) // stride + 1
    choose(KERNELS, init, "model.init")
    choose(DTYPES, dtype, "model.dtype")
    choose(CONVOLUTIONS, convolution, "model.convolution")
    return functional(
        lambda rngs: SeriesCNN(
            shape[0],
            shape[1] if len(shape) == 2 else 1,
            outputs,
            tuple(widths),
            tuple(windows),
            stride,
            padding,
            init,
            dtype,
            convolution,
            rngs,
        )  # fmt: skip
    )
