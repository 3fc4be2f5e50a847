"""SOAP: Adam in the eigenbasis of Shampoo's statistics (Vyas et al. 2024, arXiv 2409.11321, algorithm 3).

    m <- b1 m + (1 - b1) g                                   in the parameter's own basis
    v <- b2 v + (1 - b2) (Q_L^T g Q_R)^2                     in the eigenbasis
    u = Q_L [Q_L^T m Q_R / (sqrt(v) + eps)] Q_R^T            times Adam's sqrt(1 - b2^t) / (1 - b1^t)
    L <- b L + (1 - b) g g^T,  R <- b R + (1 - b) g^T g
    Q <- Q of the QR of L Q, every `every` steps             one power iteration; its columns, and v's, by falling eigenvalue

The last two axes of a parameter are a matrix [rows, columns], those before them a batch (stacked layers; a convolution's
positions). A side longer than `largest` keeps the identity; parameters of fewer than 2 axes are Adam's. As the authors' code
does, the first step only begins the statistics and moves nothing: the basis must not be that of the gradient that it rotates.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.core.tree import Path, leaves_with_paths
from research.core.types import Array, Tree
from research.optim._matrices import Kept, by_path, kept, transposed, wide, with_leaves, zeros_like
from research.optim._stacks import over_matrices


class Side(NamedTuple):
    """One side of all matrices: the statistics by path, [*batch, size, size], and the bases."""

    statistics: Kept
    basis: Kept


def _eye(x: Any, size: int) -> Array:
    return jnp.broadcast_to(jnp.eye(size, dtype=wide(x)), (*x.shape[:-2], size, size))


def _rotated(x: Array, left: Array | None, right: Array | None) -> Array:
    """Q_L^T x Q_R."""
    x = x if left is None else transposed(left) @ x
    return x if right is None else x @ right


def _back(x: Array, left: Array | None, right: Array | None) -> Array:
    """Q_L x Q_R^T."""
    x = x if left is None else left @ x
    return x if right is None else x @ transposed(right)


def _eigenbasis(statistic: Array) -> Array:
    """The eigenvectors of [size, size] as columns, by falling eigenvalue."""
    return jnp.linalg.eigh(statistic)[1][:, ::-1]


def _iterated(statistic: Array, basis: Array) -> tuple[Array, Array]:
    """(the basis after one power iteration and QR, the order [1, size] that its columns were put in before)."""
    product = statistic @ basis
    order = jnp.argsort(-(basis * product).sum(0))
    return jnp.linalg.qr(product[:, order])[0], order[None]


def scale_by_soap(
    *, b1: float = 0.95, b2: float = 0.95, b_statistics: float = 0.95, eps: float = 1e-8, every: int = 10, largest: int = 10000
) -> optax.GradientTransformation:
    """SOAP's direction. every: steps from one QR to the next. largest: size of a side above which it keeps the identity.

    State: {"count" int32, "mean", "square" shaped as params, "left": {"statistics", "basis"} [*batch, rows, rows], "right" the
    same of columns}, float32 or wider. On a mesh a statistic and a basis are laid out as the dimension that they are of, and
    each device takes the QR of its own share of them. Raises ValueError where every or largest is below 1.
    """
    for name, value in {"every": every, "largest": largest}.items():
        if value < 1:
            raise ValueError(f"optimizer.{name}={value} is out of range: 1 or above")

    def has(x: Any, axis: int) -> bool:
        return x.ndim >= 2 and x.shape[axis] <= largest

    def init(params: Tree) -> dict[str, Any]:
        state = {"count": jnp.int32(0), "mean": zeros_like(params), "square": zeros_like(params)}
        for name, axis in (("left", -2), ("right", -1)):
            bases = kept(params, lambda x, axis=axis: _eye(x, x.shape[axis]) if has(x, axis) else None)
            state[name] = {"statistics": jax.tree.map(jnp.zeros_like, bases), "basis": bases}
        return state

    def update(updates: Tree, state: dict[str, Any], params: Tree | None = None):
        del params
        count, gradients = state["count"], by_path(updates)
        sides = {name: Side(*(by_path(state[name][key]) for key in Side._fields)) for name in ("left", "right")}

        def bases(path: Path) -> tuple[Array | None, Array | None]:
            return sides["left"].basis.get(path), sides["right"].basis.get(path)

        # Adam, whose steps count from the second on
        began = count > 0
        mean = jax.tree.map(lambda m, g: jnp.where(began, b1 * m + (1 - b1) * g, m), state["mean"], updates)
        square, direction = {}, {}
        rate = jnp.sqrt(1 - b2 ** jnp.maximum(count, 1)) / (1 - b1 ** jnp.maximum(count, 1))
        for (path, m), (_, v) in zip(leaves_with_paths(mean), leaves_with_paths(state["square"])):
            g = _rotated(gradients[path].astype(v.dtype), *bases(path))
            square[path] = jnp.where(began, b2 * v + (1 - b2) * g**2, v)
            u = _back(_rotated(m, *bases(path)) / (jnp.sqrt(square[path]) + eps), *bases(path))
            direction[path] = rate.astype(u.dtype) * u  # 0 at the first step, as the mean is

        for name, side in sides.items():
            for path, s in side.statistics.items():
                g = gradients[path].astype(s.dtype)
                gram = g @ transposed(g) if name == "left" else transposed(g) @ g
                side.statistics[path] = b_statistics * s + (1 - b_statistics) * gram

        keys = [(name, path) for name, side in sides.items() for path in side.statistics]
        statistics = [sides[name].statistics[path] for name, path in keys]
        old = [sides[name].basis[path] for name, path in keys]

        def begun(v: Kept) -> tuple[list[Array], Kept]:
            return over_matrices(_eigenbasis, [[s] for s in statistics]), v

        def turned(v: Kept) -> tuple[list[Array], Kept]:
            made, v = over_matrices(_iterated, list(zip(statistics, old))), dict(v)
            for (name, path), (_, order) in zip(keys, made):
                along = transposed(order) if name == "left" else order
                v[path] = jnp.take_along_axis(v[path], jnp.broadcast_to(along, v[path].shape), -2 if name == "left" else -1)
            return [basis for basis, _ in made], v

        case = jnp.where(count == 0, 2, jnp.where(count % every == 0, 1, 0))
        new, square = jax.lax.switch(case, [lambda v: (old, v), turned, begun], square)
        for (name, path), basis in zip(keys, new):
            sides[name].basis[path] = basis
        after = {name: {k: with_leaves(state[name][k], getattr(side, k)) for k in Side._fields} for name, side in sides.items()}
        out = with_leaves(updates, {path: u.astype(gradients[path].dtype) for path, u in direction.items()})
        counted = optax.safe_increment(count)
        return out, {"count": counted, "mean": mean, "square": with_leaves(state["square"], square), **after}

    return optax.GradientTransformation(init, update)
