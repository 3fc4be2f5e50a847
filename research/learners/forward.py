"""Running a task over data without a gradient: calibration, batch statistics, measurements."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from research.core.contracts import check_task
from research.core.types import Batch, Example, Key, Learner, Metrics, State, Task, Variables
from research.estimates._example import linear_regression
from research.learners._update import axes_of, begun, loss_metric, strong, variables_of


def forward(task: Task) -> Learner:
    """Each step evaluates the loss and keeps the new "state"; params never move.

    State: "step" int32, "params", "state", "frozen". Metrics: the task's and "loss". Raises ValueError for a task that breaks
    its contract.
    """
    abstract = check_task(task, methods=False)

    def init(key: Key, variables: Variables | None = None) -> State:
        return {"step": jnp.zeros((), jnp.int32), **strong(begun(task, abstract, key, variables))}

    def step(state: State, batch: Batch, key: Key) -> tuple[State, Metrics]:
        loss, aux = task.loss(variables_of(state), batch, key)
        metrics = {**aux.metrics, "loss": loss_metric(loss, aux.weight)}
        return {**state, "step": state["step"] + 1, "state": aux.state}, metrics

    axes = {"step": jax.P(), **axes_of(task, abstract)}
    return Learner(init, step, variables_of, task.methods, task.batch, axes)


def example() -> Example:
    return Example(forward(linear_regression()))
