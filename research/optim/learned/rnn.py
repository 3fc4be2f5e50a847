"""A recurrent network for each entry of each parameter, all with the same weights."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import optax

from research.core.types import Array, Key, LearnedOptimizer, Tree
from research.optim.learned._features import State, dense


def coordinatewise_rnn(*, hidden: int = 20, layers: int = 2, step: float = 0.1, cut: float = 10.0) -> LearnedOptimizer:
    """step times the output of an LSTM that reads the gradient of an entry, and keeps a state of its own for each.

    Andrychowicz et al. 2016, "Learning to learn by gradient descent by gradient descent" (arXiv 1606.04474), section 2.1, with
    the preprocessing of appendix A: a gradient g is read as (log|g| / cut, sign g), below e^-cut as (-1, e^cut g). theta:
    {"cells": {"0": {"kernel" [inputs + hidden, 4 hidden], "bias"}, …}, "out"}, the gates in the order input, forget, cell,
    output, the forget gate's bias beginning at 1. The state of an entry is 2 * hidden * layers numbers, float32.

    Raises ValueError: sizes below 1, a scale that is not above 0.
    """
    if min(hidden, layers) < 1 or not step > 0 or not cut > 0:
        raise ValueError(
            f"coordinatewise_rnn: hidden={hidden}, layers={layers}, step={step}, cut={cut}; "
            "allowed: sizes from 1, scales above 0"
        )

    def init(key: Key) -> Tree:
        cells = {}
        for i in range(layers):
            made = dense(jax.random.fold_in(key, i), [(hidden if i else 2) + hidden, 4 * hidden])["0"]
            cells[str(i)] = {**made, "bias": made["bias"].at[hidden : 2 * hidden].set(1.0)}
        return {"cells": cells, "out": dense(jax.random.fold_in(key, layers), [hidden, 1])["0"]}

    def read(g: Array) -> Array:
        """[entries, 2] of entries."""
        size, least = jnp.abs(g), math.exp(-cut)
        large = size >= least
        logarithm = jnp.log(jnp.where(large, size, 1.0)) / cut
        return jnp.stack([jnp.where(large, logarithm, -1.0), jnp.where(large, jnp.sign(g), g / least)], -1)

    def cell(weights: Tree, x: Array, h: Array, c: Array) -> tuple[Array, Array]:
        gates = jnp.concatenate([x, h], -1) @ weights["kernel"] + weights["bias"][None]
        i, f, g, o = jnp.split(gates, 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(c), c

    def transformation(theta: Tree) -> optax.GradientTransformation:
        def begin(params: Tree) -> State:
            entries = sum(p.size for p in jax.tree.leaves(params))
            nothing = jnp.zeros((entries, hidden))
            return State(jnp.zeros((), jnp.int32), (), {str(i): {"h": nothing, "c": nothing} for i in range(layers)})

        def update(updates: Tree, state: State, params: Tree | None = None) -> tuple[Tree, State]:
            leaves, structure = jax.tree.flatten(updates)
            x = read(jnp.concatenate([g.astype(jnp.float32).reshape(-1) for g in leaves]))
            kept = {}
            for i in range(layers):
                before = state.extra[str(i)]
                x, c = cell(theta["cells"][str(i)], x, before["h"], before["c"])
                kept[str(i)] = {"h": x, "c": c}
            moved = step * (x @ theta["out"]["kernel"] + theta["out"]["bias"][None])[:, 0]
            ends = [0, *itertools.accumulate(g.size for g in leaves)]
            parts = [moved[a:b].reshape(g.shape).astype(g.dtype) for a, b, g in zip(ends, ends[1:], leaves)]
            return jax.tree.unflatten(structure, parts), State(state.t + 1, (), kept)

        return optax.GradientTransformation(begin, update)

    return LearnedOptimizer(init, transformation)
