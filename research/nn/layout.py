"""The one place where layers meet the mesh: activations by logical names."""

from __future__ import annotations

import jax


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` with its dimensions named by logical axes, such as `constrain(x, "batch", "length", "embed")`; what a mesh does about
    the names is `research.core.mesh`'s to say. Without a mesh it is `x` itself."""
    if len(axes) != x.ndim:
        raise ValueError(f"constrain: {len(axes)} axis names {axes} for a shape {x.shape}")
    return x
