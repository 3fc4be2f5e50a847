"""Params moved by the losses of samples alone: evolution strategies."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from research.core.axes import POPULATION
from research.core.contracts import check_task
from research.core.merge import merged
from research.core.mesh import axes_of as mesh_axes_of
from research.core.mesh import constrained
from research.core.types import Batch, Example, Key, Learner, Metrics, State, Task, Variables
from research.estimates._example import linear_regression
from research.learners._update import axes_of, begun, loss_metric, strong, variables_of
from research.optim.strategies import Strategy, snes


def evolution(task: Task, strategy: Strategy) -> Learner:
    """Each step is a generation: `strategy` draws samples around the params, each sample's loss is taken on the same batch with
    the same key, and the losses say how the params move. No gradient is taken, so a loss need not have any.

    Params of all floating dtypes are one vector of the widest of them, float32 at least. Samples are evaluated by vmap; where
    the mesh in use lays "population" over one of its axes, each device evaluates its own.

    State: "step" int32, "params" (the mean of the search), "state", "frozen", "search" (of the strategy). Metrics: "loss", the
    mean over samples, "loss_best", that of the best one, and the task's, summed over samples; a sample whose loss is not finite
    counts nowhere, and is the worst to the strategy. "state" is merged over samples by `Task.merge`.

    Raises ValueError: a task that breaks its contract, params that are not floating.
    """
    abstract = check_task(task, methods=False)
    axes = axes_of(task, abstract)
    for x in jax.tree.leaves(abstract["params"]):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"evolution: params are floating, got {x.dtype} {x.shape}")
    if not jax.tree.leaves(abstract["params"]):
        raise ValueError("evolution: the task has no params to search over")

    def wide(params):
        return jax.tree.map(lambda p: p.astype(jnp.promote_types(p.dtype, jnp.float32)), params)

    def init(key: Key, variables: Variables | None = None) -> State:
        variables = strong(begun(task, abstract, key, variables))
        search = strategy.init(ravel_pytree(wide(variables["params"]))[0])
        return {"step": jnp.zeros((), jnp.int32), **variables, "search": strong(search)}

    def step(state: State, batch: Batch, key: Key) -> tuple[State, Metrics]:
        k_samples, k_loss = jax.random.split(key)
        variables = variables_of(state)
        unravel = ravel_pytree(wide(state["params"]))[1]

        def params_of(vector):
            return jax.tree.map(lambda x, p: x.astype(p.dtype), unravel(vector), state["params"])

        def one(sample):
            return task.loss({**variables, "params": params_of(sample)}, batch, k_loss)

        samples = strategy.ask(state["search"], k_samples)
        over = mesh_axes_of(POPULATION) or None
        losses, aux = jax.vmap(one, spmd_axis_name=over)(constrained(samples, POPULATION, None))
        finite = jnp.isfinite(losses)
        search = strong(strategy.tell(state["search"], samples, jnp.where(finite, losses, jnp.nan)))

        weights = finite * (jnp.ones_like(losses) if aux.weight is None else aux.weight)
        each, weight = loss_metric(jnp.where(finite, losses, 0), weights)
        best = jnp.where(finite, losses, jnp.inf).min()
        found = finite.any().astype(best.dtype)
        metrics = {
            **{name: (_sum(finite, s), _sum(finite, w)) for name, (s, w) in aux.metrics.items()},
            "loss": (each.sum(), weight.sum()),
            "loss_best": (jnp.where(found > 0, best, 0), found),
        }
        new = {"params": params_of(search["mean"]), "state": merged(aux.state, weights, state["state"], task.merge)}
        return {**state, **new, "step": state["step"] + 1, "search": search}, metrics

    abstract_search = jax.eval_shape(init, jax.eval_shape(jax.random.key, 0))["search"]
    axes = {"step": jax.P(), **axes, "search": jax.tree.map(lambda _: jax.P(), abstract_search)}
    return Learner(init, step, variables_of, task.methods, task.batch, axes)


def _sum(finite: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(finite, x, 0).sum()


def example() -> Example:
    return Example(evolution(linear_regression(), snes(6, 0.1)))
