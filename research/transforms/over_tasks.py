"""A batch of tasks: as many batches, one loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from research.core.merge import merged
from research.core.types import Aux, Batch, Example, Key, Method, Task, Tree, Variables
from research.transforms._example import small_classifier
from research.transforms._trees import keys, leading, led


def over_tasks(task: Task, n: int) -> Task:
    """The task's loss over `n` of its batches at once, each leaf with a new first axis [n, ...] that is now the "batch" axis;
    the one within is called "inner_batch".

    Every batch is computed from the same variables, with a key of its own. The loss is the mean of theirs weighted by their
    Aux.weight, whose sum is the new weight; losses without one count 1 each, so that n of what could not be split, such as n
    episodes of an inner loop, can be. Metrics add up; the new states are merged by `Task.merge`. Methods take n inputs
    and give n outputs. A batch of weight 0 must have a finite loss, as masked means of this project do: its gradient
    counts 0 times.

    Raises ValueError for n below 1, for a task without batches (`drawn`, `unroll`), or where the leaves of a batch do not share
    their first axis.
    """
    if n < 1:
        raise ValueError(f"over_tasks: n={n}; allowed: 1 or more")
    if not jax.tree.leaves(task.batch):
        raise ValueError(
            f"over_tasks: the task's batch is {{}}, of which there are no {n}; allowed: drawn(over_tasks(task, {n}), draw), "
            f"or, of unroll(family, learned, length), the problems of an estimate, truncated(horizon, problems={n})"
        )

    def loss(variables: Variables, batch: Batch, key: Key) -> tuple[jax.Array, Aux]:
        count = leading(batch, "over_tasks")  # a share of the n where an estimate splits the batch
        losses, aux = jax.vmap(task.loss, (None, 0, 0))(variables, batch, keys(key, count))
        weights = jnp.ones_like(losses) if aux.weight is None else aux.weight
        total = weights.sum()
        value = jnp.where(weights > 0, weights * losses, 0).sum() / jnp.where(total > 0, total, 1)
        state = merged(aux.state, weights, variables["state"], task.merge)
        return value, Aux(state, jax.tree.map(lambda x: x.sum(0), dict(aux.metrics)), total)

    def lifted(method: Method) -> Method:
        def apply(variables: Variables, inputs: Tree, key: Key) -> Tree:
            count = leading(inputs, "over_tasks")
            return jax.vmap(method.apply, (None, 0, 0))(variables, inputs, keys(key, count))

        return Method(apply, jax.tree.map(lambda spec: led(spec, n), method.inputs))

    methods = {name: lifted(method) for name, method in task.methods.items()}
    return task._replace(loss=loss, methods=methods, batch=jax.tree.map(lambda spec: led(spec, n), task.batch))


def example() -> Example:
    return Example(over_tasks(small_classifier(batch=3), 4))
