"""What optimizers of matrices share: which leaves have matrices, and trees of what is kept for these alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from research.core.tree import Path, leaves_with_paths, map_with_path, nested
from research.core.types import Array, Tree

Kept = dict[Path, Array]


def wide(x: Any) -> Any:
    """The dtype that statistics of `x` are kept in: float32, or wider where x is."""
    return jnp.promote_types(x.dtype, jnp.float32)


def is_matrix(x: Any) -> bool:
    """Whether a leaf is a matrix or a batch of them, with an entry at least."""
    return x.ndim >= 2 and x.size > 0


def zeros_like(params: Tree) -> Tree:
    return jax.tree.map(lambda p: jnp.zeros(p.shape, wide(p)), params)


def kept(params: Tree, make: Callable[[Any], Array | None]) -> dict[str, Any]:
    """Nested dicts of `make(leaf)` at the paths of `params`, without those that it gives None for. An array of as many
    dimensions as its parameter is laid out on a mesh as the dimensions that it shares with it (`research.core.axes`)."""
    made = ((path, make(x)) for path, x in leaves_with_paths(params))
    return nested((path, x) for path, x in made if x is not None)


def by_path(tree: Tree) -> Kept:
    return dict(leaves_with_paths(tree))


def with_leaves(tree: Tree, leaves: Kept) -> Tree:
    """The tree with the leaves at these paths instead of its own."""
    return map_with_path(lambda path, x: leaves.get(path, x), tree)


def transposed(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)
