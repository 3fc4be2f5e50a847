"""What estimates share: sums by weight, and cutting a batch along its "batch" axis."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from research.core.tree import joined, map_with_path
from research.core.types import Array, Aux, Batch, Tree


def counted(weight: Array | None, tree: Tree) -> Tree:
    """The tree where there is weight, zeros where there is none: what saw nothing may be 0/0."""
    return tree if weight is None else jax.tree.map(lambda x: jnp.where(weight == 0, jnp.zeros_like(x), x), tree)


def weight_of(aux: Aux, who: str) -> Array:
    """`Aux.weight`. Raises ValueError where it is None: such a loss is no weighted mean, and nothing may split its batch."""
    if aux.weight is None:
        raise ValueError(f"{who}: the loss is no weighted mean over its batch (Aux.weight is None), so it cannot be split")
    return aux.weight


def weighted(weight: Array, tree: Tree) -> Tree:
    """weight * tree, in float32 or the tree's own dtype if that is wider; zeros where the weight is 0."""

    def one(x: Array) -> Array:
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        return weight.astype(dtype) * x.astype(dtype)

    return counted(weight, jax.tree.map(one, tree))


def mean_of(sums: Tree, total: Array, like: Tree) -> Tree:
    """sums / total in the dtypes of `like`; zeros where the total is 0."""
    return jax.tree.map(lambda s, x: (s / jnp.where(total == 0, 1, total)).astype(x.dtype), sums, like)


def microbatches(batch: Batch, specs: Tree, n: int, who: str) -> Batch:
    """The batch as n: each leaf [n, *shape], its "batch" axis n times shorter; leaves without one are repeated.

    Row r goes to microbatch r % n (by stride), so that a batch laid out over devices stays where it is. Raises ValueError (one
    line) where a "batch" axis is not divisible by n.
    """

    def cut(path, spec, x: Array) -> Array:
        if "batch" not in spec.axes:
            return jnp.broadcast_to(x, (n, *x.shape))
        i = spec.axes.index("batch")
        if x.shape[i] % n:
            raise ValueError(f'{who}: the "batch" axis of {joined(path)}, {x.shape[i]}, is not divisible by {n}')
        x_rows = x.reshape(*x.shape[:i], x.shape[i] // n, n, *x.shape[i + 1 :])
        return jnp.moveaxis(x_rows, i + 1, 0)

    return map_with_path(cut, specs, batch)
