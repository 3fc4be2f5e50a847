"""Metrics as (sum, weight) pairs: exact means over shards, microbatches and ragged last batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.core.types import Array, Metrics


def masked(values: Array, mask: Array) -> tuple[Array, Array]:
    """(sum, weight) of `values` where `mask` is not 0, float32. A masked value counts nothing, NaN and infinity included."""
    mask = jnp.asarray(mask, jnp.float32)
    return jnp.where(mask != 0, values * mask, 0.0).sum().astype(jnp.float32), mask.sum()


def mean(pair: tuple[Array, Array]) -> Array:
    """sum / weight; 0 where the weight is 0."""
    total, weight = pair
    return jnp.where(weight == 0, 0.0, total / jnp.where(weight == 0, 1.0, weight))


def stack_on_host(calls: Sequence[Metrics]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Metrics of several calls, each with a leading axis of steps, as NumPy arrays of all their steps."""
    host = jax.device_get(list(calls))
    return {k: (_joined(host, k, 0), _joined(host, k, 1)) for k in host[0]} if host else {}


def _joined(calls: Sequence[Metrics], name: str, which: int) -> np.ndarray:
    return np.concatenate([np.asarray(call[name][which]) for call in calls])


def averaged(stacked: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """{name: mean over steps}: a float, or an array, one a member of a population. NaN where nothing counted."""
    out = {}
    for name, (total, weight) in stacked.items():
        total, weight = np.broadcast_arrays(np.asarray(total, np.float64), np.asarray(weight, np.float64))
        with np.errstate(invalid="ignore", divide="ignore"):
            value = total.sum(0) / weight.sum(0)
        out[name] = float(value) if value.ndim == 0 else value
    return out
