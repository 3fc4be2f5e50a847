"""PSGD with Kronecker factors, fitted by whitening (Li 2018, arXiv 1512.04202; Li 2022, arXiv 2211.04422; the update is that
of the authors' and their users' implementations, https://github.com/lixilinx/psgd_torch and
https://github.com/evanatyourservice/kron_torch).

    m <- b m + (1 - b) g,  h = m / (1 - b^t)
    direction = Q_L^T Q_L h Q_R^T Q_R, scaled down to a root mean square of at most 1.1
    A = Q_L h Q_R^T,  B = Q_L^-T V Q_R^-1,  V normal             Q upper triangular, fitted so that E[direction h^T] is like I:
    Q_L <- Q_L - r triu(A A^T - B B^T) Q_L / |A A^T + B B^T|     Q_R likewise, of A^T A and B^T B

The last two axes of a parameter are a matrix, those before them a batch. A side longer than `largest`, and parameters of fewer
than 2 axes or without entries, have a diagonal Q, kept as its diagonal, for which triu(.) is that of the diagonal and |.| its
largest entry.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.scipy.linalg import solve_triangular

from research.core.tree import leaves_with_paths
from research.core.types import Array, Tree
from research.optim._matrices import by_path, is_matrix, kept, wide, with_leaves, zeros_like
from research.optim._stacks import over_matrices

TINY = float(jnp.finfo(jnp.bfloat16).tiny)
CLIP = 1.1  # of the direction's root mean square, as kron_torch has it


def probability(count: Array, largest: float = 1.0, smallest: float = 0.03, decay: float = 0.001, flat: int = 500) -> Array:
    """How often Q is fitted at step `count`: at every step first, then ever more rarely."""
    return jnp.clip(largest * jnp.exp(-decay * (count - flat)), smallest, largest).astype(jnp.float32)


def lower_bound(a: Array) -> Array:
    """A lower bound, near in practice, of the largest singular value of a symmetric [n, n]."""
    top = jnp.abs(a).max()
    a = a / jnp.where(top > 0, top, 1)
    columns, rows = (a**2).sum(0), (a**2).sum(1)

    def unit(x: Array) -> Array:
        return x / jnp.maximum(jnp.linalg.norm(x), jnp.finfo(x.dtype).tiny)

    by_column = jnp.linalg.norm(unit(a[:, jnp.argmax(columns)] @ a) @ a.T)
    by_row = jnp.linalg.norm(a.T @ unit(a @ a[jnp.argmax(rows)]))
    return top * jnp.where(columns.max() > rows.max(), by_column, by_row)


def _times(q: Array, x: Array) -> Array:
    """Q x of a Q [m, m], or a diagonal one [1, m]."""
    return q.T * x if q.shape[0] == 1 else q @ x


def _fitted(q: Array, first: Array, second: Array, rate: float) -> Array:
    """Q after a step, from what A A^T and B B^T are for its side; for a diagonal Q their diagonals [1, m]."""
    if q.shape[0] == 1:
        return q - rate * (first - second) * q / (jnp.abs(first + second).max() + TINY)
    return q - rate * jnp.triu(first - second) @ q / (lower_bound(first + second) + TINY)


def _gram(x: Array, q: Array) -> Array:
    return (x**2).sum(1)[None] if q.shape[0] == 1 else x @ x.T


def fitted(left: Array, right: Array, h: Array, v: Array, *, rate: float) -> tuple[Array, Array]:
    """(Q_L, Q_R) after a step on h and v, both [m, n]. A diagonal Q is [1, size]."""
    a = _times(right, _times(left, h).T).T
    b = v.T / right.T if right.shape[0] == 1 else solve_triangular(right, v.T, trans=1)
    b = b.T / left.T if left.shape[0] == 1 else solve_triangular(left, b.T, trans=1)
    return (
        _fitted(left, _gram(a, left), _gram(b, left), rate),
        _fitted(right, _gram(a.T, right), _gram(b.T, right), rate),
    )


def fitted_vector(q: Array, h: Array, v: Array, *, rate: float) -> Array:
    """The diagonal Q of a vector, all three of one shape, after a step."""
    first, second = (q * h) ** 2, (v / q) ** 2
    return q - rate * (first - second) * q / (jnp.abs(first + second).max(initial=0) + TINY)


def preconditioned(left: Array, right: Array, h: Array) -> Array:
    """Q_L^T Q_L h Q_R^T Q_R of h [m, n]."""

    def squared(q: Array, x: Array) -> Array:
        return (q**2).T * x if q.shape[0] == 1 else q.T @ (q @ x)

    return squared(right, squared(left, h).T).T


def noise(seed: int, count: Array, leaf: int, like: Array) -> Array:
    """V of a leaf, by number, at a step: a function of these and of nothing else."""
    return jax.random.normal(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), count), leaf), like.shape, like.dtype)


def scale_by_psgd_kron(
    *,
    momentum: float = 0.9,
    rate: float = 0.1,
    initial: float = 1.0,
    largest: int = 8192,
    probability: Callable[[Array], Array] = probability,
    balance_every: int = 100,
    seed: int = 0,
    draw: Callable[[int, Array, int, Array], Array] = noise,
) -> optax.GradientTransformation:
    """PSGD's direction.

    rate: of the fit of Q. initial: Q begins with this scale for the whole matrix. largest: size of a side above which Q is
    diagonal. probability: of a fit at step `count`; fits fall where their expected number since the last one reaches 1, without
    chance. balance_every: fits between two that give Q_L and Q_R equal largest entries, which leaves the direction as it is
    (the published ones balance by chance, with 0.01). seed: of V; members of a population have the same. draw: V itself.

    State: {"count", "since", "fits" int32, "momentum" shaped as params, "left" [*batch, m, m], "right" [*batch, n, n], or
    [*batch, m], [*batch, n] where diagonal, "diagonal" of vectors}, float32 or wider. On a mesh a Q is laid out as the
    dimension that it is of, and each device fits its own share of all. Raises ValueError where largest or balance_every is
    below 1.
    """
    for name, value in {"largest": largest, "balance_every": balance_every}.items():
        if value < 1:
            raise ValueError(f"optimizer.{name}={value} is out of range: 1 or above")

    def side(x: Any, axis: int) -> Array | None:
        if not is_matrix(x):
            return None
        size, scale = x.shape[axis], initial**0.5
        if size > largest or size == 1:
            return jnp.full((*x.shape[:-2], size), scale, wide(x))
        return jnp.broadcast_to(scale * jnp.eye(size, dtype=wide(x)), (*x.shape[:-2], size, size))

    def init(params: Tree) -> dict[str, Any]:
        return {
            "count": jnp.int32(0),
            "since": jnp.int32(0),
            "fits": jnp.int32(0),
            "momentum": zeros_like(params),
            "left": kept(params, lambda x: side(x, -2)),
            "right": kept(params, lambda x: side(x, -1)),
            "diagonal": kept(params, lambda x: None if is_matrix(x) else jnp.full(x.shape, initial, wide(x))),
        }

    def as_matrix(q: Array, of: Array) -> Array:
        """[*batch, size, size], or [*batch, 1, size] where it is kept as a diagonal."""
        return q[..., None, :] if q.ndim < of.ndim else q

    def update(updates: Tree, state: dict[str, Any], params: Tree | None = None):
        del params
        count = state["count"]
        mean = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g.astype(m.dtype), state["momentum"], updates)
        unbiased = {path: m / (1 - momentum ** (count + 1)).astype(m.dtype) for path, m in leaves_with_paths(mean)}
        number = {path: i for i, path in enumerate(unbiased)}
        since = state["since"] + 1
        due = since >= 1 / probability(count)
        q = {name: by_path(state[name]) for name in ("left", "right", "diagonal")}
        matrices = list(q["left"])

        def fit() -> dict[str, Any]:
            pairs = {path: [as_matrix(q[name][path], unbiased[path]) for name in ("left", "right")] for path in matrices}
            balance = state["fits"] % balance_every == balance_every - 1
            groups = []
            for path, (left, right) in pairs.items():
                tops = [jnp.abs(x).max((-2, -1), keepdims=True) for x in (left, right)]
                middle = jnp.sqrt(tops[0] * tops[1])
                left, right = (jnp.where(balance, x * (middle / top), x) for x, top in zip((left, right), tops))
                groups.append([left, right, unbiased[path], draw(seed, count, number[path], unbiased[path])])
            made = over_matrices(partial(fitted, rate=rate), groups)
            vectors = {
                path: fitted_vector(x, unbiased[path], draw(seed, count, number[path], unbiased[path]), rate=rate)
                for path, x in q["diagonal"].items()
            }
            left, right = ({path: own[i].reshape(q[n][path].shape) for path, own in zip(matrices, made)} for i, n in SIDES)
            return {"left": left, "right": right, "diagonal": vectors}

        q = jax.lax.cond(due, fit, lambda: q)
        direction = {path: x**2 * unbiased[path] for path, x in q["diagonal"].items()}
        for path in matrices:
            h = unbiased[path]
            flat = (x.reshape(-1, *x.shape[-2:]) for x in (*(as_matrix(q[n][path], h) for _, n in SIDES), h))
            direction[path] = jax.vmap(preconditioned)(*flat).reshape(h.shape)
        clipped = {path: d * jnp.minimum(CLIP / (jnp.sqrt((d**2).mean()) + 1e-6), 1) for path, d in direction.items()}
        out = jax.tree.map(lambda u, g: u.astype(g.dtype), with_leaves(updates, clipped), updates)
        return out, {
            "count": optax.safe_increment(count),
            "since": jnp.where(due, 0, since),
            "fits": state["fits"] + due,
            "momentum": mean,
            **{name: with_leaves(state[name], q[name]) for name in q},
        }

    return optax.GradientTransformation(init, update)


SIDES = ((0, "left"), (1, "right"))
