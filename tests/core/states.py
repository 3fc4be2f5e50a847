"""States to save, and what is done to them on disk."""

from __future__ import annotations

import collections
from pathlib import Path

import jax
import jax.numpy as jnp

from research.core.checkpoint import Checkpoints

Momentum = collections.namedtuple("Momentum", "count trace")


def rich_state(step: int = 3) -> dict:
    """All that orbax has been seen to trip over, in one State."""
    return {
        "step": jnp.int32(step),
        "params": {"layers": {str(i): jnp.full((2, 3), float(i)) for i in range(12)}, "empty": {}, "none": jnp.zeros((0, 4))},
        "opt": (Momentum(jnp.int32(7), {"w": jnp.linspace(0, 1, 5).astype(jnp.bfloat16)}), (), [jnp.ones(2)]),
        "state": {"a.b": jnp.float32(1), "a": {"b": jnp.float32(2)}, "a%2Eb": jnp.float32(3), "c/d": jnp.float32(4)},
        "memory": {
            "key": jax.random.key(5),
            "keys": jax.random.split(jax.random.key(6, impl="rbg"), 3),
            "int4": jnp.arange(5, dtype=jnp.int4),
            "fp8": jnp.arange(5, dtype=jnp.float8_e4m3fn),
            "flag": jnp.array([True, False]),
            "complex": jnp.array([1 + 2j]),
        },
        "frozen": {"teacher": {"w": jnp.arange(6.0).reshape(2, 3)}, "key": jax.random.key(9)},
    }


def small_state(step: int, scale: float = 1.0) -> dict:
    return {"step": jnp.int32(step), "params": {"w": jnp.full((4, 2), step * scale)}, "frozen": {}}


def abstract(state: dict) -> dict:
    return jax.eval_shape(lambda: state)


def saved(directory: Path, steps=(1, 2), **options) -> Checkpoints:
    checkpoints = Checkpoints(directory, **options)
    for step in steps:
        checkpoints.save(small_state(step), position={"batches": {"next_index": step}})
    checkpoints.wait()
    return checkpoints


def names(directory: Path) -> set[str]:
    return {p.name for p in directory.iterdir()}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


# Content
