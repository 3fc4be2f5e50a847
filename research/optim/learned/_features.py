"""What learned optimizers see of a parameter: running moments of its gradient, and the time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.core.types import Array, Tree

TIMES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)


class Moments(NamedTuple):
    """Of one parameter. momentum: means of g, one array a decay; square: means of g^2; row and column: means of g^2 over the
    last axis and over the last but one, of parameters of fewer than 2 axes both g^2 itself. All float32."""

    momentum: tuple[Array, ...]
    square: tuple[Array, ...]
    row: tuple[Array, ...]
    column: tuple[Array, ...]


class State(NamedTuple):
    """t: int32, updates so far. moments: a Moments for each parameter, in the order of jax's leaves. extra: what else."""

    t: Array
    moments: tuple[Moments, ...]
    extra: Any = ()


class Decays(NamedTuple):
    """Each a tuple of scalars or floats."""

    momentum: tuple[Any, ...]
    square: tuple[Any, ...]
    factored: tuple[Any, ...]


def offsets(decays: Decays) -> Tree:
    """The part of theta that learns decays: zeros, from which `moved_by` gives the decays themselves."""
    return {name: jnp.zeros(len(given)) for name, given in decays._asdict().items() if given}


def moved_by(decays: Decays, theta: Tree) -> Decays:
    """The decays, with log(1 - decay) moved by 10 times theta (Metz et al. 2022, arXiv 2203.11860, as published)."""

    def one(name: str, given: Sequence[float]) -> tuple[Array, ...]:
        return tuple(1 - (1 - d) * jnp.exp(10 * theta[name][i]) for i, d in enumerate(given))

    return Decays(*(one(name, given) for name, given in decays._asdict().items()))


def no_moments(decays: Decays, p: Array) -> Moments:
    like = jnp.zeros(p.shape, jnp.float32)
    row, column = (like.mean(-1), like.mean(-2)) if p.ndim > 1 else (like, like)
    return Moments(
        *((x,) * len(n) for x, n in ((like, decays.momentum), (like, decays.square), (row, decays.factored))),
        (column,) * len(decays.factored),
    )


def with_gradient(moments: Moments, decays: Decays, g: Array) -> Moments:
    """The moments after one more gradient (float32)."""

    def mixed(kept: Sequence[Array], rates: Sequence[Any], new: Array) -> tuple[Array, ...]:
        return tuple(d * old + (1 - d) * new for d, old in zip(rates, kept, strict=True))

    square = g**2
    row, column = (square.mean(-1), square.mean(-2)) if g.ndim > 1 else (square, square)
    return Moments(
        mixed(moments.momentum, decays.momentum, g),
        mixed(moments.square, decays.square, square),
        mixed(moments.row, decays.factored, row),
        mixed(moments.column, decays.factored, column),
    )


def spread(x: Array, axis: int, like: Array) -> Array:
    """A row or column statistic in the shape of the parameter: as it is for one of fewer than 2 axes."""
    return jnp.broadcast_to(jnp.expand_dims(x, axis), like.shape) if like.ndim > 1 else x


def factors(row: Array, column: Array, like: Array) -> Array:
    """1 / sqrt of the second moment that rows and columns give (Shazeer and Stern 2018, arXiv 1804.04235, algorithm 4); its own
    1 / sqrt for a parameter of fewer than 2 axes."""
    if like.ndim < 2:
        return jax.lax.rsqrt(row + 1e-9)
    relative = row / (row.mean(-1, keepdims=True) + 1e-9)
    return spread(jax.lax.rsqrt(relative + 1e-9), -1, like) * spread(jax.lax.rsqrt(column + 1e-9), -2, like)


def unit(x: Array) -> Array:
    """x over its root mean square, over all of the parameter."""
    return x * jax.lax.rsqrt(1e-5 + jnp.mean(x**2))


def time(t: Array) -> Array:
    """tanh(t / scale - 1) for scales of 1 to 100,000 steps, float32 [11]."""
    return jnp.tanh(t.astype(jnp.float32) / jnp.asarray(TIMES) - 1)


def unbiased(mean: Array, decay: Any, t: Array) -> Array:
    """A running mean that began at 0, as if it had not: divided by 1 - decay^t (Kingma and Ba 2015, arXiv 1412.6980)."""
    return mean / (1 - decay ** t.astype(jnp.float32))


def dense(key: Array, sizes: Sequence[int], last: float = 1.0) -> Tree:
    """Layers {"0": {"kernel", "bias"}, …}: truncated normals of standard deviation fan_in^-1/2, the last times `last`."""
    layers = {}
    for i, (fan_in, width) in enumerate(zip(sizes, sizes[1:])):
        scale = fan_in**-0.5 * (last if i == len(sizes) - 2 else 1.0)
        drawn = jax.random.truncated_normal(jax.random.fold_in(key, i), -2.0, 2.0, (fan_in, width))
        layers[str(i)] = {"kernel": scale * drawn, "bias": jnp.zeros(width)}
    return layers


def network(layers: Tree, features: Sequence[Array], constant: Array) -> list[Array]:
    """An MLP with ReLUs on `features`, arrays of one shape, and on `constant` [n], the same everywhere: its outputs, each an
    array of that shape.

    The layers are so narrow that sums of arrays, which fuse, are faster than products of matrices of all features of all
    entries, which would have to be made first.
    """
    count, xs = len(features), list(features)
    for i in range(len(layers)):
        kernel, bias = layers[str(i)]["kernel"], layers[str(i)]["bias"]
        if i == 0:
            bias = bias + constant @ kernel[count:]
        sums = [sum(x * kernel[j, k] for j, x in enumerate(xs)) + bias[k] for k in range(kernel.shape[1])]
        xs = sums if i == len(layers) - 1 else [jax.nn.relu(s) for s in sums]
    return xs


Step = Callable[[Array, Array, Moments, Array], Array]  # (parameter, gradient, moments with it, t after it) -> update


def by_parameter(decays: Callable[[], Decays], step: Step) -> optax.GradientTransformation:
    """A transformation whose update of a parameter is `step` of that parameter's own moments. float32 inside; updates in the
    parameter's dtype."""

    def init(params: Tree) -> State:
        return State(jnp.zeros((), jnp.int32), tuple(no_moments(decays(), p) for p in jax.tree.leaves(params)))

    def update(updates: Tree, state: State, params: Tree | None = None) -> tuple[Tree, State]:
        if params is None:
            raise ValueError(optax.NO_PARAMS_MSG)
        rates, t = decays(), state.t + 1
        gradients, structure = jax.tree.flatten(updates)
        gradients = [g.astype(jnp.float32) for g in gradients]
        moments = tuple(with_gradient(m, rates, g) for m, g in zip(state.moments, gradients, strict=True))
        moved = [
            step(p.astype(jnp.float32), g, m, t).astype(p.dtype)
            for p, g, m in zip(jax.tree.leaves(params), gradients, moments, strict=True)
        ]
        return jax.tree.unflatten(structure, moved), State(t, moments)

    return optax.GradientTransformation(init, update)
