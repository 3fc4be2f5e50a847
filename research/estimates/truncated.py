"""Episodes, cut into truncations: each call goes on where the one before left its inner problems."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from research.core.types import Aux, Batch, Estimate, Example, Key, Task, Tree, Variables
from research.estimates._example import leaking_state
from research.estimates._particles import (
    Horizon,
    check_horizon,
    first_left,
    laid_out,
    lengths,
    over_particles,
    particle_axes,
    states,
    where,
)
from research.estimates._weighted import mean_of, weighted
from research.estimates.exact import exact


def truncated(horizon: Horizon, inner: Estimate = exact(), problems: int = 1, *, staggered: bool = True) -> Estimate:
    """`inner` on `problems` copies of the task's state, each going on from call to call, and begun afresh by `task.init` every
    `horizon` calls.

    With `exact` on `transforms.unroll` it is truncated backpropagation through time (Werbos 1990): a call's gradient sees its
    own steps, and the state before them as given. With `es` it is truncated ES. Both are biased where an influence outlasts a
    truncation, as in influence balancing (`tasks.influence_balancing`).

    horizon: calls an episode lasts, or (least, most) of them, drawn log-uniformly for each episode. staggered: first episodes
    end after different numbers of calls, so that every call sees problems of all ages; else all begin together.

    Memory: "left" int32 [problems], "state" [problems, …], "inner" (of `inner`, for each), the leading axis laid over the mesh
    by the name "particles". Loss, gradient and metrics are means and sums over problems, by Aux.weight where there is one.
    The state in Variables stays as it was: the problems are the estimate's own.

    Raises ValueError: a horizon below 1 or with its ends the wrong way round, problems below 1.
    """
    check_horizon("truncated", horizon)
    if problems < 1:
        raise ValueError(f"truncated: problems={problems}; allowed: 1 or more")

    def init(task: Task, variables: Variables, key: Key) -> Tree:
        k_state, k_left, k_inner = jax.random.split(key, 3)
        state = states(task, k_state, problems)

        def own(state: Tree, key: Key) -> Tree:
            return inner.init(task, {**variables, "state": state}, key)

        memory = jax.vmap(own)(state, jax.random.split(k_inner, problems))
        return {"left": first_left(horizon, k_left, problems, staggered), "state": state, "inner": memory}

    def grads(memory: Tree, task: Task, variables: Variables, batch: Batch, key: Key):
        k_state, k_left, k_inner = jax.random.split(key, 3)
        begins = memory["left"] == 0
        left = jnp.where(begins, lengths(horizon, k_left, problems), memory["left"])
        state = laid_out(where(begins, states(task, k_state, problems), memory["state"]))

        def own(memory: Tree, state: Tree, key: Key):
            return inner.grads(memory, task, {**variables, "state": state}, batch, key)

        mapped = over_particles(own, 0, problems)
        losses, aux, each, kept = mapped(memory["inner"], state, jax.random.split(k_inner, problems))
        weights = jnp.ones_like(losses) if aux.weight is None else aux.weight
        total = weights.sum()
        sums = jax.tree.map(lambda x: x.sum(0), jax.vmap(weighted)(weights, (losses, each)))
        value, gradients = mean_of(sums, total, (losses, variables["params"]))
        metrics = jax.tree.map(lambda x: x.sum(0), aux.metrics)
        memory = {"left": left - 1, "state": aux.state, "inner": kept}
        return value, Aux(variables["state"], metrics, None if aux.weight is None else total), gradients, memory

    def axes(task: Task, memory: Tree) -> Tree:
        return particle_axes(memory)

    return Estimate(init, grads, axes)


def example() -> Example:
    return Example(
        truncated(3, problems=2), leaking_state(), exact_gradient=False, why="it is that of its own problems, not of Variables'"
    )
