"""Axes of trees that nobody named: optimizer state, estimate memory, populations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from research.core.tree import Path, leaves_with_paths, map_with_path
from research.core.types import GROUPS, Tree, Variables

Names = tuple[str | None, ...]
POPULATION = "population"


def replicated(tree: Tree) -> Tree:
    """Axes that name nothing: an empty `jax.P` beside every leaf."""
    return jax.tree.map(lambda _: jax.P(), tree)


def _agreed(candidates: Sequence[Names]) -> Names:
    """The name of each dimension where all candidates (of one length) give the same, None where they do not."""
    return tuple(names[0] if all(n == names[0] for n in names) else None for names in zip(*candidates))


def _fitted(shape: tuple[int, ...], of: tuple[int, ...], axes: Names) -> list[Names]:
    """What an array of `shape`, kept for a variable of shape `of` and axes `axes`, may have as axes; [] if it is unrelated."""
    extra = len(shape) - len(of)
    if extra >= 0 and shape[extra:] == of:  # moments; leading dimensions of particles or copies are nobody's
        return [(None,) * extra + axes]
    if extra == 0 and any(size == own for size, own in zip(shape, of)):  # a statistic of one of its dimensions, [rows, rows]
        return [tuple(name if size == own else None for name, size, own in zip(axes, shape, of))]
    if extra == -1:  # a factored second moment: the variable less one dimension
        return [axes[:i] + axes[i + 1 :] for i in range(len(of)) if of[:i] + of[i + 1 :] == shape]
    return []


def axes_like(tree: Tree, variables: Variables, axes: Tree) -> Tree:
    """Axes of any array tree (optimizer state, estimate memory) from those of the Variables it was made for.

    A leaf belongs to the variable whose whole path, with or without "params", "state" or "frozen" before it, ends the leaf's
    own path; the longest such path decides. It takes that variable's axes if it has its shape, with or without leading
    dimensions (which stay unnamed), or its shape less one dimension. A leaf of as many dimensions, such as the [rows, rows] of
    Shampoo's statistics, takes the names of those whose sizes it shares. Where more than one dimension could be missing, as in
    a factored square matrix, or two variables share the path, only the names that all readings agree on are kept: laying out a
    dimension by the wrong name costs communication, leaving it whole only memory. Everything else is replicated.

    tree, variables: leaves with a shape, abstract ones too. axes: `jax.P` beside every leaf of `variables`.
    """
    known: dict[Path, list[tuple[tuple[int, ...], Names]]] = {}
    for group in GROUPS:
        for (path, x), (_, names) in zip(leaves_with_paths(variables[group]), leaves_with_paths(axes[group])):
            padded = tuple(names) + (None,) * (len(x.shape) - len(names))
            for suffix in (path, (group, *path)):
                known.setdefault(suffix, []).append((tuple(x.shape), padded))

    def one(path: Path, x: Any) -> jax.P:
        for i in range(len(path)):
            if path[i:] in known:
                readings = [names for shape, own in known[path[i:]] for names in _fitted(tuple(x.shape), shape, own)]
                return jax.P(*_agreed(readings)) if readings else jax.P()
        return jax.P()

    return map_with_path(one, tree)


def stacked(axes: Tree) -> Tree:
    """`in_axes` of a vmap over a population: 0 where a leaf's axes start with "population", else None."""
    return jax.tree.map(lambda a: 0 if a and a[0] == POPULATION else None, axes)
