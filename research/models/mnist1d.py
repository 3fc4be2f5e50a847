"""The four models of the MNIST-1D paper (Greydanus and Kobak 2020, arXiv 2011.14439; github.com/greydanus/mnist1d)."""

from __future__ import annotations

from collections.abc import Sequence

from research.core.names import choose
from research.models.gru import gru
from research.models.mlp import mlp
from research.models.series_cnn import series_cnn
from research.nn.functional import Functional

PARAMETERS = {"linear": 410, "mlp": 15210, "cnn": 5210, "gru": 5134}


def mnist1d(*, kind: str, shape: Sequence[int], outputs: int) -> Functional:
    """`kind`, one of linear, mlp, cnn and gru, as published, started as PyTorch starts them; float32 [batch, 40] -> [batch, 10]
    there.

    linear: one layer. mlp: 100, then 100 added to the first. cnn: 25 channels three times, windows 5, 3, 3, stride 2, padding
    1. gru: 6 states in each direction, an output layer on all of them. For 40 inputs and 10 classes the numbers of parameters
    are PARAMETERS.
    """
    choose(PARAMETERS, kind, "model.kind")
    common = {"shape": shape, "outputs": outputs, "init": "uniform", "dtype": "float32"}
    if kind == "cnn":
        # patches, so that many seeds at once stay matrix products
        return series_cnn(widths=[25] * 3, windows=[5, 3, 3], stride=2, padding=1, convolution="patches", **common)
    if kind == "gru":
        return gru(hidden=6, layers=1, bidirectional=True, readout="all", unroll=1, **common)
    hidden = [100, 100] if kind == "mlp" else []
    return mlp(hidden=hidden, activation="relu", residual=True, dropout=0.0, **common)
