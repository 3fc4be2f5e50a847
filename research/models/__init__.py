"""Whole networks, by name. Each factory takes keyword arguments only, all required, so that a config says every one."""

from research.models.transformer import transformer

MODELS = {
    "transformer": transformer,
}

__all__ = ["MODELS", *MODELS]
