"""Batches drawn inside the step."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from research.core.axes import replicated
from research.core.contracts import abstract_batch, abstract_key, check_same
from research.core.mesh import constrained
from research.core.types import Aux, Batch, Example, Key, Task, Tree, Variables
from research.transforms._example import small_classifier
from research.transforms._trees import axes_of, inside


def drawn(task: Task, draw: Callable[[Tree, Key], Batch], data: Tree | None = None) -> Task:
    """The task on batches that `draw(data, key)`, a pure function, makes of the step's key: its own batch is {}, for which
    `core.batches.nothing` stands. Nothing comes from the host, so that many steps a call cost no input at all.

    data: a dict of arrays that `draw` reads, kept in frozen["data"]; the task's own frozen is frozen["task"].

    The loss is a mean over what is drawn, not over a batch that is given, so Aux.weight is None and no estimate splits it.
    Methods stay as they are. Raises ContractError (one line: path, expected, got) where `draw` does not give what the task's
    Specs say.
    """
    data = {} if data is None else data
    made = jax.eval_shape(draw, data, abstract_key())
    check_same(abstract_batch(task.batch), made, "drawn: draw(data, key)")

    def init(key: Key) -> Variables:
        variables = task.init(key)
        return inside(variables, {"task": variables["frozen"], "data": data})

    def own(variables: Variables) -> Variables:
        return inside(variables, variables["frozen"]["task"])

    def loss(variables: Variables, batch: Batch, key: Key) -> tuple[jax.Array, Aux]:
        k_draw, k_loss = jax.random.split(key)
        made = draw(variables["frozen"]["data"], k_draw)
        made = jax.tree.map(lambda spec, x: constrained(x, *spec.axes), task.batch, made)
        value, aux = task.loss(own(variables), made, k_loss)
        return value, aux._replace(weight=None)

    methods = {name: m._replace(apply=_within(m.apply, own)) for name, m in task.methods.items()}
    axes = axes_of(task)
    axes = {**axes, "frozen": {"task": axes["frozen"], "data": replicated(data)}}
    return task._replace(init=init, loss=loss, methods=methods, batch={}, axes=axes)


def _within(apply: Callable, own: Callable[[Variables], Variables]) -> Callable:
    return lambda variables, inputs, key: apply(own(variables), inputs, key)


def example() -> Example:
    task = small_classifier(batch=4)

    def draw(data: Tree, key: Key) -> Batch:
        rows = jax.random.randint(key, (4,), 0, data["inputs"].shape[0])
        return {**jax.tree.map(lambda x: x[rows], data), "mask": jnp.ones(4)}

    data = {"inputs": jax.random.normal(jax.random.key(0), (10, 3)), "targets": jnp.arange(10, dtype=jnp.int32) % 3}
    return Example(drawn(task, draw, data))
