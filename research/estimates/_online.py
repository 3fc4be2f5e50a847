"""Antithetic pairs whose states go on from call to call at perturbed parameters: what `pes` and `noise_reuse` share."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from research.core.types import Array, Batch, Estimate, Key, Task, Tree, Variables
from research.estimates._particles import (
    Horizon,
    both_ways,
    check_horizon,
    check_spread,
    first_left,
    laid_out,
    lengths,
    noise,
    particle_axes,
    slope,
    states,
    where,
)
from research.estimates._weighted import counted

# (noise kept so far, noise drawn now, which particles begin an episode) -> (what moves the parameters now, what is kept, which
# is also what the difference of losses is credited to)
Rule = Callable[[Tree, Tree, Array], tuple[Tree, Tree]]


def online(who: str, rule: Rule, sigma: float, pairs: int, horizon: Horizon, staggered: bool) -> Estimate:
    """The mean over pairs of (L+ - L-) (kept noise) / (2 sigma^2), L the loss of this call, from the state of each particle.

    Memory: "left" int32 [pairs], "noise" [pairs, …] as params, "states" [pairs, 2, …], plus first, their leading axis laid over
    the mesh by the name "particles"; "itself": {"left", "state"} of one unperturbed problem.
    Both particles of a pair begin in one state and share every key. Loss and Aux are those of the unperturbed problem, at the
    parameters themselves, which costs one further evaluation to the 2 * pairs; metrics also has "perturbed", the mean loss of
    all perturbed ones, which varies less. The state in Variables stays as it was.
    """
    check_spread(who, sigma, pairs)
    check_horizon(who, horizon)

    def twice(tree: Tree) -> Tree:
        return jax.tree.map(lambda x: jnp.stack([x, x], 1), tree)

    def init(task: Task, variables: Variables, key: Key) -> Tree:
        k_states, k_left, k_itself = jax.random.split(key, 3)
        none = jax.tree.map(lambda p: jnp.zeros((pairs, *p.shape), p.dtype), variables["params"])
        return {
            "left": first_left(horizon, k_left, pairs, staggered),
            "noise": none,
            "states": twice(states(task, k_states, pairs)),
            "itself": {"left": jnp.zeros((), jnp.int32), "state": task.init(k_itself)["state"]},
        }

    def grads(memory: Tree, task: Task, variables: Variables, batch: Batch, key: Key):
        k_states, k_left, k_noise, k_losses, k_itself = jax.random.split(key, 5)
        begins = memory["left"] == 0
        left = jnp.where(begins, lengths(horizon, k_left, pairs), memory["left"])
        before = laid_out(where(begins, twice(states(task, k_states, pairs)), memory["states"]))
        moved, kept = rule(memory["noise"], noise(sigma, k_noise, variables["params"], pairs), begins)
        losses, after = both_ways(task, variables, batch, moved, before, jax.random.split(k_losses, pairs))

        value, aux, itself = _itself(memory["itself"], horizon, task, variables, batch, k_itself)
        value, gradients = counted(aux.weight, (value, slope(losses, kept, sigma)))
        perturbed = (losses.sum(), jnp.full_like(losses.sum(), losses.size))
        aux = aux._replace(state=variables["state"], metrics={**aux.metrics, "perturbed": perturbed})
        return value, aux, gradients, {"left": left - 1, "noise": kept, "states": after, "itself": itself}

    def axes(task: Task, memory: Tree) -> Tree:
        alone = jax.tree.map(lambda _: jax.P(), memory["itself"])
        return {**particle_axes({k: v for k, v in memory.items() if k != "itself"}), "itself": alone}

    return Estimate(init, grads, axes)


def _itself(memory: Tree, horizon: Horizon, task: Task, variables: Variables, batch: Batch, key: Key):
    """(loss, Aux, memory) of the unperturbed problem, which begins afresh as the others do."""
    k_state, k_left, k_loss = jax.random.split(key, 3)
    begins = memory["left"] == 0
    left = jnp.where(begins, lengths(horizon, k_left, 1)[0], memory["left"])
    state = jax.tree.map(lambda a, b: jnp.where(begins, a, b), task.init(k_state)["state"], memory["state"])
    value, aux = task.loss({**variables, "state": state}, batch, k_loss)
    return value, aux, {"left": left - 1, "state": aux.state}
