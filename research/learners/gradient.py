"""The plain learner: a gradient, an optimizer, one set of params."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from research.core.contracts import check_task
from research.core.types import Batch, Estimate, Example, Key, Learner, Metrics, State, Task, Variables
from research.estimates import exact
from research.estimates._example import linear_regression
from research.learners._update import (
    axes_of,
    begun,
    group_metrics,
    loss_metric,
    norm,
    player,
    strong,
    variables_of,
    watched,
)
from research.optim.scheduled import evaluated


def gradient(
    task: Task,
    tx: optax.GradientTransformation,
    estimate: Estimate = exact(),
    watch: Mapping[str, str] | None = None,
) -> Learner:
    """Params move by `tx` along the gradient that `estimate` gives of the task's loss.

    State: "step" int32, "params", "state", "frozen", "opt" (of tx), "memory" (of the estimate). Metrics: the task's, "loss"
    (weighted by Aux.weight, by 1 where that is None), "grad_norm". watch: {group: regular expression, searched for in the
    paths of params joined by slashes}; each group adds "grad_norm/<group>" and "update_ratio/<group>", the norm of the update
    over that of the weights. `variables` gives the params that the optimizer says to evaluate, where those are not the ones
    being trained (`research.optim.scheduled`: schedule_free).

    Raises ValueError: a task that breaks its contract, a pattern that matches nothing.
    """
    abstract = check_task(task, methods=False)
    axes, mover, groups = axes_of(task, abstract), player(task, tx, estimate), watched(watch or {}, abstract["params"])

    def init(key: Key, variables: Variables | None = None) -> State:
        k_variables, k_memory = jax.random.split(key)
        variables = strong(begun(task, abstract, k_variables, variables))
        opt, memory = mover.begin(variables, k_memory)
        return {"step": jnp.zeros((), jnp.int32), **variables, "opt": opt, "memory": memory}

    def step(state: State, batch: Batch, key: Key) -> tuple[State, Metrics]:
        variables = variables_of(state)
        moved = mover.move(variables, state["opt"], state["memory"], batch, key)
        grad_norm = norm(jax.tree.leaves(moved.grads))
        metrics = {
            **moved.aux.metrics,
            "loss": loss_metric(moved.loss, moved.aux.weight),
            "grad_norm": (grad_norm, jnp.ones_like(grad_norm)),
            **group_metrics(groups, variables["params"], moved),
        }
        new = {"step": state["step"] + 1, "params": moved.params, "state": moved.aux.state}
        return {**state, **new, "opt": moved.opt, "memory": moved.memory}, metrics

    def variables(state: State) -> Variables:
        return {**variables_of(state), "params": evaluated(state["opt"], state["params"])}

    opt_axes, memory_axes = mover.axes(abstract, axes)
    axes = {"step": jax.P(), **axes, "opt": opt_axes, "memory": memory_axes}
    return Learner(init, step, variables, task.methods, task.batch, axes)


def example() -> Example:
    return Example(gradient(linear_regression(), optax.sgd(0.1, momentum=0.9), watch={"kernels": "kernel$", "biases": "bias$"}))
