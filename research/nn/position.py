"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864, eq. 34), in the half-split layout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

TURN = 2**32  # of the integer phase: a multiple of it wraps, so that no position is too large for float32
LARGEST_CONSTANT = 2**18  # elements of a table kept in the program; XLA would compute it anew in every fusion that reads it


def _phase_steps(head_dim: int, base: float) -> np.ndarray:
    """uint32 [head_dim / 2]: base^(-2i / head_dim) radians, as parts of a turn."""
    if head_dim % 2:
        raise ValueError(f"rotary embedding turns pairs: head_dim={head_dim} is odd; nearest: {head_dim - 1} or {head_dim + 1}")
    frequency = float(base) ** (-np.arange(0, head_dim, 2) / head_dim)
    return np.round(frequency / (2 * np.pi) * TURN).astype(np.uint32)


def rotary_tables(start: int | jax.Array, length: int, head_dim: int, base: float):
    """cos and sin, float32 [length, head_dim / 2], of the angles (start + t) x base^(-2i / head_dim), t < length.

    Phases are integers, so a table that begins at a traced `start` equals the slice of the whole one: to 1e-6 radians at any
    position, and from the exact angle by at most position x 7e-10 radians. Raises ValueError for an odd head_dim.
    """
    steps = _phase_steps(head_dim, base)
    constant = isinstance(start, int) and length * head_dim // 2 <= LARGEST_CONSTANT
    numbers = np if constant else jnp
    positions = numbers.arange(length, dtype=numbers.uint32) + numbers.asarray(start).astype(numbers.uint32)
    angle = (positions[:, None] * steps[None]).astype(numbers.float32) * numbers.float32(2 * np.pi / TURN)
    return numbers.cos(angle), numbers.sin(angle)


def rotate(x_BxTxHxD: jax.Array, tables) -> jax.Array:
    """Turns (x_i, x_{i + D/2}) by the angle of its position. Dot products of turned queries and keys depend on distance
    alone."""
    cos, sin = (table[None, :, None, :] for table in tables)
    first, second = jnp.split(x_BxTxHxD, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
