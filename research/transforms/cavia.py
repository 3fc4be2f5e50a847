"""Learning to read a context that is found by gradient descent."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from research.core.names import choose
from research.core.types import Array, Aux, Batch, Example, Key, Method, Spec, Task, Tree, Variables
from research.transforms._adapting import Adapting, by_gradient, check_optimizer, check_steps, episodic
from research.transforms._example import small_classifier
from research.transforms._trees import axes_of


def cavia(
    task: Task,
    size: int,
    inner_tx: optax.GradientTransformation = optax.sgd(1.0),
    steps: int = 1,
    *,
    into: str = "inputs",
    order: str = "second",
    truncation: int | None = None,
    support: int | None = None,
) -> Task:
    """`maml` in which a context adapts and params do not (Zintgraf et al. 2019, arXiv 1810.03642, equations 3 and 4): `size`
    numbers that begin at 0 in every episode and are put behind the last axis of batch[into]. The task must thus take inputs of
    as many more features as the batches of this one have: [batch, ..., features + size] to [batch, ..., features].

    Variables are the task's own. All else, and what is raised, as in `maml`; ValueError too where the batch has no such leaf,
    or it has no more than `size` features. Of the methods, those that take `into` stay.
    """
    check_optimizer("cavia", inner_tx)
    through = check_steps("cavia", steps, order, truncation)
    read = contextual(task, size, into)
    adapting = Adapting(
        lambda params: jnp.zeros(size),
        lambda params, context: {"task": params, "context": context},
        lambda params: inner_tx,
    )
    episodes = episodic(read, by_gradient(read, adapting, steps, through), support, who="cavia")
    return episodes._replace(init=task.init, axes=axes_of(task))


def contextual(task: Task, size: int, into: str) -> Task:
    """The task with params {"task": its own, "context": [size], at first 0} on batches without the context."""
    if size < 1:
        raise ValueError(f"cavia: size={size}; allowed: 1 or more")
    if not isinstance(task.batch, dict):
        raise ValueError(f"cavia: into={into!r}: the task's batch is no dict")
    features = choose(task.batch, into, "cavia: into").shape[-1:]
    if not features or features[0] <= size:
        shape = task.batch[into].shape
        raise ValueError(f"cavia: size={size}: the task's {into} has the shape {shape}; its last axis must be longer")

    def own(variables: Variables) -> Variables:
        return {**variables, "params": variables["params"]["task"]}

    def read(variables: Variables, batch: Batch) -> Batch:
        x, context = batch[into], variables["params"]["context"]
        behind = jnp.broadcast_to(context.astype(x.dtype), (*x.shape[:-1], size))
        return {**batch, into: jnp.concatenate([x, behind], -1)}

    def shorter(spec: Spec) -> Spec:
        return dataclasses.replace(spec, shape=(*spec.shape[:-1], spec.shape[-1] - size))

    def init(key: Key) -> Variables:
        variables = task.init(key)
        return {**variables, "params": {"task": variables["params"], "context": jnp.zeros(size)}}

    def loss(variables: Variables, batch: Batch, key: Key) -> tuple[Array, Aux]:
        return task.loss(own(variables), read(variables, batch), key)

    def lifted(method: Method) -> Method:
        def apply(variables: Variables, inputs: Tree, key: Key) -> Tree:
            return method.apply(own(variables), read(variables, inputs), key)

        return Method(apply, {**method.inputs, into: shorter(method.inputs[into])})

    methods = {name: lifted(m) for name, m in task.methods.items() if isinstance(m.inputs, dict) and into in m.inputs}
    axes = axes_of(task)
    axes = {**axes, "params": {"task": axes["params"], "context": jax.P()}}
    return Task(init, loss, methods, {**task.batch, into: shorter(task.batch[into])}, axes, task.merge)


def example() -> Example:
    return Example(cavia(small_classifier(batch=4, features=5), 2, optax.sgd(0.5), steps=2))
