"""What estimates share that keep many copies: antithetic pairs of particles, their axis on the mesh, and when an episode ends.

A particle is a copy of the task's state at parameters of its own. Copies lie along one leading axis, called "particles", which
the rules of the mesh lay over its axes; "frozen" and the batch are shared by all, never copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from research.core.mesh import axes_of, constrained, size_of, taken
from research.core.types import Array, Batch, Key, Task, Tree, Variables

PARTICLES = "particles"
Horizon = int | Sequence[int]


def check_spread(who: str, sigma: float, pairs: int) -> None:
    if not sigma > 0 or pairs < 1:
        raise ValueError(f"{who}: sigma={sigma}, pairs={pairs}; allowed: sigma above 0, pairs 1 or more")


def check_horizon(who: str, horizon: Horizon) -> None:
    ends = (horizon, horizon) if isinstance(horizon, int) else horizon
    whole = isinstance(ends, (tuple, list)) and len(ends) == 2 and all(isinstance(n, int) for n in ends)
    if not whole or not 1 <= ends[0] <= ends[1]:
        raise ValueError(f"{who}: horizon={horizon}; allowed: calls an episode lasts, 1 or more, or (least, most) of them")


def _ends(horizon: Horizon) -> tuple[int, int]:
    return (horizon, horizon) if isinstance(horizon, int) else (horizon[0], horizon[1])


def lengths(horizon: Horizon, key: Key, n: int) -> Array:
    """How many calls each of n episodes lasts, int32 [n]: the horizon, or log-uniform between its ends, both included."""
    least, most = _ends(horizon)
    drawn = jnp.exp(jax.random.uniform(key, (n,), jnp.float32, jnp.log(least), jnp.log(most + 1)))
    return jnp.clip(jnp.floor(drawn).astype(jnp.int32), least, most)


def first_left(horizon: Horizon, key: Key, n: int, staggered: bool) -> Array:
    """Calls left of the first episodes, int32 [n]: none, or, staggered, spread evenly, so that later calls see all ages."""
    return jnp.arange(n, dtype=jnp.int32) * lengths(horizon, key, n) // n * staggered


def where(begins: Array, new: Tree, old: Tree) -> Tree:
    """`new` for those of the leading axis that begin, `old` for the others."""
    return jax.tree.map(lambda a, b: jnp.where(begins.reshape(-1, *(1,) * (b.ndim - 1)), a, b), new, old)


def states(task: Task, key: Key, n: int) -> Tree:
    """Fresh states of the task, [n, …]."""
    return jax.vmap(lambda k: task.init(k)["state"])(jax.random.split(key, n))


def laid_out(tree: Tree) -> Tree:
    """The tree with its leading axis over the mesh axes of "particles", where they divide it."""
    return jax.tree.map(lambda x: constrained(x, PARTICLES, *(None,) * (x.ndim - 1)), tree)


def particle_axes(tree: Tree) -> Tree:
    """Axes of what is stacked over particles."""
    return jax.tree.map(lambda _: jax.P(PARTICLES), tree)


def over_particles(function: Callable[..., Any], in_axes: Any, n: int) -> Callable[..., Any]:
    """`function` mapped over n particles. Where the mesh lays them over some of its axes each device computes its own, and
    within, nothing else is laid over those axes."""
    axes = () if axes_of("layers") or n % size_of(axes_of(PARTICLES)) else axes_of(PARTICLES)

    def within(*args: Any) -> Any:
        with taken(axes):
            return function(*args)

    return jax.vmap(within, in_axes, spmd_axis_name=axes or None)


def noise(sigma: float, key: Key, params: Tree, pairs: int) -> Tree:
    """N(0, sigma^2), [pairs, *shape] for each of params, in its dtype."""
    leaves, structure = jax.tree.flatten(params)
    drawn = [sigma * jax.random.normal(jax.random.fold_in(key, i), (pairs, *p.shape), p.dtype) for i, p in enumerate(leaves)]
    return laid_out(jax.tree.unflatten(structure, drawn))


def both_ways(task: Task, variables: Variables, batch: Batch, moved: Tree, states: Tree, keys: Key) -> tuple[Array, Tree]:
    """(losses [pairs, 2], states [pairs, 2, …]) at params plus and at params minus `moved` [pairs, …], which share a key.

    states: of each particle, [pairs, 2, …], plus first.
    """

    def pair(moved: Tree, states: Tree, key: Key) -> tuple[Array, Tree]:
        def one(sign: Array, state: Tree) -> tuple[Array, Tree]:
            params = jax.tree.map(lambda p, d: p + sign.astype(p.dtype) * d, variables["params"], moved)
            loss, aux = task.loss({**variables, "params": params, "state": state}, batch, key)
            return loss, aux.state

        return jax.vmap(one)(jnp.array([1.0, -1.0]), states)

    return over_particles(pair, 0, keys.shape[0])(moved, states, keys)


def slope(losses: Array, moved: Tree, sigma: float) -> Tree:
    """The mean over pairs of (L+ - L-) / (2 sigma^2) times `moved`: the antithetic estimate of the gradient, in its dtypes."""
    difference = (losses[:, 0] - losses[:, 1]) / (2 * sigma**2)

    def one(d: Array) -> Array:
        dtype = jnp.promote_types(d.dtype, jnp.float32)
        return (jnp.tensordot(difference.astype(dtype), d.astype(dtype), 1) / d.shape[0]).astype(d.dtype)

    return jax.tree.map(one, moved)
