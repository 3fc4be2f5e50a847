"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864, eq. 34), in the half-split layout."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotary_tables(positions_T: jax.Array, head_dim: int, base: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [length, head_dim / 2], of position x base^(-2i / head_dim). Raises ValueError for an odd
    head_dim."""
    if head_dim % 2:
        raise ValueError(f"rotary embedding turns pairs: head_dim={head_dim} is odd; nearest: {head_dim - 1} or {head_dim + 1}")
    frequency = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions_T.astype(jnp.float32)[:, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BxTxHxD: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns (x_i, x_{i + D/2}) by the angle of its position. Dot products of turned queries and keys depend on distance
    alone."""
    cos, sin = (table[:, None, :] for table in tables)
    first, second = jnp.split(x_BxTxHxD, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
