"""A loss that is a network, learned so that what is trained by it does well by another."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from research.core import metrics
from research.core.contracts import abstract_batch, abstract_key, abstract_variables
from research.core.names import choose
from research.core.types import Array, Aux, Batch, Example, Key, Method, Task, Tree, Variables
from research.transforms._example import small_classifier
from research.transforms._trees import axes_of


def learned_loss(task: Task, width: int = 32, *, method: str = "predict", mask: str = "mask") -> Task:
    """A classifier trained by the masked mean of softplus(f(log p, one-hot target)) instead of its own loss, f a network of two
    hidden layers of tanh (the learned losses of Bechtle et al. 2021, arXiv 1906.05374, section 3.1).

    params: {"inner": the task's, "outer": f's}, so this is an inner task of `bilevel`, whose outer task is
    `with_learned_loss(task, width)`, the task's own loss on the same Variables. The state is that after the task's own loss.
    Metrics are the task's. Methods are the task's own. Raises ValueError (one line): a method that is not there, outputs that
    are not [batch, classes], a width below 1.
    """
    if width < 1:
        raise ValueError(f"learned_loss: width={width}; allowed: 1 or more")
    apply = choose(task.methods, method, "learned_loss: method").apply
    variables, specs = abstract_variables(task), abstract_batch(task.batch)
    shape = jax.eval_shape(apply, variables, specs, abstract_key()).shape
    if len(shape) != 2:
        raise ValueError(f"learned_loss: {method} gives {shape}; expected [batch, classes]")
    classes = shape[1]
    sizes = [2 * classes, width, width, 1]

    def init(key: Key) -> Variables:
        k_task, *layers = jax.random.split(key, len(sizes))
        own = task.init(k_task)
        outer = {
            str(i): {"kernel": jax.random.normal(k, (a, b)) * a**-0.5, "bias": jnp.zeros(b)}
            for i, (k, a, b) in enumerate(zip(layers, sizes, sizes[1:]))
        }
        return {**own, "params": {"inner": own["params"], "outer": outer}}

    def per_example(outer: Tree, logits: Array, targets: Array) -> Array:
        x = jnp.concatenate([jax.nn.log_softmax(logits), jax.nn.one_hot(targets, classes, dtype=logits.dtype)], -1)
        for i in range(len(sizes) - 1):
            x = x @ outer[str(i)]["kernel"] + outer[str(i)]["bias"][None]
            x = jnp.tanh(x) if i < len(sizes) - 2 else jax.nn.softplus(x)
        return x[:, 0]

    def loss(variables: Variables, batch: Batch, key: Key) -> tuple[Array, Aux]:
        own = _own(variables)
        _, aux = task.loss(own, batch, key)
        values = per_example(variables["params"]["outer"], apply(own, batch, key), batch["targets"])
        return metrics.mean(metrics.masked(values, batch[mask])), jax.lax.stop_gradient(aux)

    axes = axes_of(task)
    outer_axes = jax.tree.map(lambda _: jax.P(), jax.eval_shape(init, abstract_key())["params"]["outer"])
    return task._replace(
        init=init,
        loss=loss,
        methods={name: m._replace(apply=_lifted(m)) for name, m in task.methods.items()},
        axes={**axes, "params": {"inner": axes["params"], "outer": outer_axes}},
    )


def with_learned_loss(task: Task, width: int = 32) -> Task:
    """The task's own loss on the Variables of `learned_loss(task, width)`."""

    def loss(variables: Variables, batch: Batch, key: Key) -> tuple[Array, Aux]:
        return task.loss(_own(variables), batch, key)

    return learned_loss(task, width)._replace(loss=loss)


def _own(variables: Variables) -> Variables:
    return {**variables, "params": variables["params"]["inner"]}


def _lifted(method: Method):
    return lambda variables, inputs, key: method.apply(_own(variables), inputs, key)


def example() -> Example:
    return Example(learned_loss(small_classifier(batch=4), 5))
