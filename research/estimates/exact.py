"""The gradient itself, by reverse-mode differentiation."""

from __future__ import annotations

import jax

from research.core.types import Batch, Estimate, Example, Key, Task, Tree, Variables
from research.estimates._example import linear_regression
from research.estimates._weighted import counted


def exact() -> Estimate:
    """The gradient of the task's loss on the whole batch. Where `Aux.weight` is 0, loss and gradient are 0, not 0/0."""

    def init(task: Task, variables: Variables, key: Key) -> Tree:
        return {}

    def grads(memory: Tree, task: Task, variables: Variables, batch: Batch, key: Key):
        def loss(params):
            return task.loss({**variables, "params": params}, batch, key)

        (value, aux), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        value, gradients = counted(aux.weight, (value, gradients))
        return value, aux, gradients, memory

    return Estimate(init, grads)


def example() -> Example:
    return Example(exact(), linear_regression())
