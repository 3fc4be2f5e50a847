"""Shampoo, in blocks and grafted (Gupta et al. 2018, arXiv 1802.09568, algorithm 1; Anil et al. 2020, arXiv 2002.09018; Shi et
al. 2023, arXiv 2309.06497).

    L <- b2 L + (1 - b2) g g^T,  R <- b2 R + (1 - b2) g^T g      of each block; b2 = 1: L + g g^T, as in algorithm 1
    d = L^(-1/4) g R^(-1/4)                                      roots anew every `every` steps; R of the blocks as is L
    u = d |a| / |d|                                              a: the graft's direction; norms are of a whole matrix
    m <- b1 m + (1 - b1) u                                       the update

The last two axes of a parameter are a matrix [rows, columns], those before them a batch. It is cut into blocks of `block` by
`block`, the last of a side smaller where it does not divide. Parameters of fewer than 2 axes or without entries take the
graft's direction, as does every parameter before step `start`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.core.names import choose
from research.core.tree import leaves_with_paths
from research.core.types import Array, Tree
from research.optim._matrices import by_path, is_matrix, kept, transposed, wide, with_leaves, zeros_like
from research.optim._stacks import over_matrices


class Blocks(NamedTuple):
    """How a matrix is cut: blocks [rows, columns], and how many of them down and across."""

    rows: int
    columns: int
    down: int
    across: int


def _blocks(shape: tuple[int, ...], block: int) -> Blocks:
    rows, columns = min(block, shape[-2]), min(block, shape[-1])
    return Blocks(rows, columns, math.ceil(shape[-2] / rows), math.ceil(shape[-1] / columns))


def _cut(x: Array, b: Blocks) -> Array:
    """[*batch, m, n] -> [*batch, down, across, rows, columns], filled up with zeros."""
    *batch, m, n = x.shape
    padded = jnp.pad(x, [(0, 0)] * len(batch) + [(0, b.down * b.rows - m), (0, b.across * b.columns - n)])
    return jnp.swapaxes(padded.reshape(*batch, b.down, b.rows, b.across, b.columns), -3, -2)


def _joined(x: Array, m: int, n: int) -> Array:
    """The inverse of `_cut`."""
    *batch, down, across, rows, columns = x.shape
    return jnp.swapaxes(x, -3, -2).reshape(*batch, down * rows, across * columns)[..., :m, :n]


GRAFTS: Mapping[str, str] = {
    "none": "no graft: d itself, and g where there is no d",
    "sgd": "g",
    "adagrad": "g / (sqrt(sum of g^2) + eps)",
    "rmsprop": "g / (sqrt(v) + eps), v <- b2 v + (1 - b2) g^2",
    "adam": "the same with v / (1 - b2^t)",
}


def _second_moment(graft: str, b2: float) -> Callable[[Array, Array], Array]:
    return (lambda v, g: v + g**2) if graft == "adagrad" or b2 == 1 else (lambda v, g: b2 * v + (1 - b2) * g**2)


def inverse_root(statistic: Array, eps: float) -> Array:
    """(s + eps |s| I)^(-1/4) of a positive semidefinite [size, size]; |s| its largest eigenvalue; the identity of a zero s."""
    values, vectors = jnp.linalg.eigh(statistic)
    top = values[-1]
    raised = jnp.maximum(values, 0) + eps * top
    powers = jnp.where(top > 0, jnp.where(raised > 0, raised, 1) ** -0.25, 1)
    return (vectors * powers[None]) @ vectors.T


def scale_by_shampoo(
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-6,
    every: int = 10,
    start: int = 1,
    block: int = 256,
    graft: str = "adam",
    graft_eps: float = 1e-8,
) -> optax.GradientTransformation:
    """Shampoo's direction.

    eps: of the roots, times the largest eigenvalue of a block's statistic. every: steps from one computation of the roots to
    the next, the first at the first step. start: the first step, from 1, whose direction is Shampoo's. graft: from GRAFTS. b1
    = 0 keeps no momentum.

    State: {"count" int32, "left": {"statistics", "roots"} [*batch, m, across * rows], "right" the same [*batch, down * columns,
    n], "graft", "momentum" shaped as params where there are any}, float32 or wider. Row r of "left" is that of its blocks side
    by side, column c of "right" that of its blocks one under another, so that on a mesh they are laid out as the parameter's
    rows and columns; each device takes the roots of its own share of all blocks. Raises ValueError on an unknown graft and
    where every, start or block is below 1.
    """
    choose(GRAFTS, graft, "optimizer.graft")
    for name, value in {"every": every, "start": start, "block": block}.items():
        if value < 1:
            raise ValueError(f"optimizer.{name}={value} is out of range: 1 or above")
    accumulate = _second_moment(graft, b2)

    def zero_sides(x: Any) -> tuple[Array, Array] | None:
        if not is_matrix(x):
            return None
        b, (*batch, m, n) = _blocks(x.shape, block), x.shape
        return jnp.zeros((*batch, m, b.across * b.rows), wide(x)), jnp.zeros((*batch, b.down * b.columns, n), wide(x))

    def init(params: Tree) -> dict[str, Any]:
        state: dict[str, Any] = {"count": jnp.int32(0)}
        for i, name in enumerate(("left", "right")):
            zeros = kept(params, lambda x, i=i: zero_sides(x)[i] if is_matrix(x) else None)
            state[name] = {"statistics": zeros, "roots": jax.tree.map(jnp.zeros_like, zeros)}
        if graft not in ("none", "sgd"):
            state["graft"] = zeros_like(params)
        return {**state, "momentum": zeros_like(params)} if b1 else state

    def update(updates: Tree, state: dict[str, Any], params: Tree | None = None):
        del params
        count = state["count"]
        gradients = {path: g.astype(wide(g)) for path, g in leaves_with_paths(updates)}
        matrices = [path for path in gradients if is_matrix(gradients[path])]
        cuts = {path: _blocks(gradients[path].shape, block) for path in matrices}
        new: dict[str, Any] = {"count": optax.safe_increment(count)}

        # the graft
        direction = dict(gradients)
        if "graft" in state:
            new["graft"] = jax.tree.map(lambda v, g: accumulate(v, g.astype(v.dtype)), state["graft"], updates)
            mass = 1 - b2 ** (count + 1) if graft == "adam" and b2 < 1 else 1
            for path, v in leaves_with_paths(new["graft"]):
                direction[path] = gradients[path] / (jnp.sqrt(v / jnp.asarray(mass, v.dtype)) + graft_eps)

        # statistics [*batch, down, across, size, size] of blocks, and their roots
        statistics, roots = {}, {}
        for name in ("left", "right"):
            for path, s in leaves_with_paths(state[name]["statistics"]):
                g = _cut(gradients[path], cuts[path])
                gram = _laid(g @ transposed(g) if name == "left" else transposed(g) @ g, name, s.shape)
                statistics[name, path] = s + gram if b2 == 1 else b2 * s + (1 - b2) * gram
                roots[name, path] = by_path(state[name]["roots"])[path]
        keys = list(statistics)

        def computed() -> list[Array]:
            blocks = [[_taken(statistics[key], key[0], cuts[key[1]])] for key in keys]
            made = over_matrices(lambda s: inverse_root(s, eps), blocks)
            return [_laid(root, key[0], statistics[key].shape) for key, root in zip(keys, made)]

        made = jax.lax.cond(count % every == 0, computed, lambda: [roots[key] for key in keys])
        roots = dict(zip(keys, made))
        for name in ("left", "right"):
            own = {key[1]: key for key in keys if key[0] == name}
            new[name] = {
                "statistics": with_leaves(state[name]["statistics"], {path: statistics[key] for path, key in own.items()}),
                "roots": with_leaves(state[name]["roots"], {path: roots[key] for path, key in own.items()}),
            }

        # the direction
        for path in matrices:
            g, b = gradients[path], cuts[path]
            left, right = (_taken(roots[name, path], name, b) for name in ("left", "right"))
            d = _joined(left @ _cut(g, b) @ right, *g.shape[-2:])
            if graft != "none":
                d = d * (_norm(direction[path]) / (_norm(d) + 1e-16))
            direction[path] = jnp.where(count + 1 >= start, d, direction[path])
        out = with_leaves(updates, direction)
        if b1:
            out = new["momentum"] = jax.tree.map(lambda m, u: b1 * m + (1 - b1) * u, state["momentum"], out)
        return jax.tree.map(lambda u, g: u.astype(g.dtype), out, updates), new

    return optax.GradientTransformation(init, update)


def _norm(x: Array) -> Array:
    return jnp.sqrt((x**2).sum((-2, -1), keepdims=True))


def _laid(x: Array, name: str, shape: tuple[int, ...]) -> Array:
    """Statistics of blocks [*batch, down, across, size, size] as they are kept: of "left" [*batch, m, across * size], of
    "right" [*batch, down * size, n]. The rows, or columns, that blocks were filled up with are left out: they are zero."""
    *batch, down, across, size, _ = x.shape
    flat = jnp.swapaxes(x, -3, -2).reshape(*batch, down * size, across * size)
    return flat[..., : shape[-2], : shape[-1]]


def _taken(x: Array, name: str, b: Blocks) -> Array:
    """The inverse of `_laid`, filled up with zeros: of a root they meet only the zeros of the gradient."""
    size = b.rows if name == "left" else b.columns
    return _cut(x, Blocks(size, size, b.down, b.across))
