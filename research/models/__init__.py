"""Whole networks, by name. Each factory takes keyword arguments only, all required, so that a config says every one."""

from research.models.cnn import cnn
from research.models.gru import gru
from research.models.mlp import mlp
from research.models.mnist1d import mnist1d
from research.models.series_cnn import series_cnn
from research.models.transformer import transformer
from research.models.vit import vit

MODELS = {
    "cnn": cnn,
    "gru": gru,
    "mlp": mlp,
    "mnist1d": mnist1d,
    "series_cnn": series_cnn,
    "transformer": transformer,
    "vit": vit,
}

__all__ = ["MODELS", *MODELS]
