"""Learning where to start and how far to go."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from research.core.types import Example, Key, Task, Tree, Variables
from research.transforms._adapting import Adapting, by_gradient, check_steps, episodic
from research.transforms._example import small_classifier
from research.transforms._trees import axes_of


def meta_sgd(
    task: Task,
    learning_rate: float = 0.01,
    steps: int = 1,
    *,
    order: str = "second",
    truncation: int | None = None,
    support: int | None = None,
) -> Task:
    """`maml` by gradient descent with a learned rate for every parameter, which may turn negative (Li et al. 2017, arXiv
    1707.09835, equation 2). params are {"task": the task's own, "rates": as they are}, the rates beginning at `learning_rate`.
    All else, and what is raised, as in `maml`."""
    through = check_steps("meta_sgd", steps, order, truncation)

    def init(key: Key) -> Variables:
        own = task.init(key)
        rates = jax.tree.map(lambda p: jnp.full_like(p, learning_rate), own["params"])
        return {**own, "params": {"task": own["params"], "rates": rates}}

    def tx(params: Tree) -> optax.GradientTransformation:
        return optax.stateless(lambda grads, _: jax.tree.map(lambda rate, g: -rate * g, params["rates"], grads))

    adapting = Adapting(lambda params: params["task"], lambda params, moving: moving, tx)
    axes = axes_of(task)
    axes = {**axes, "params": {"task": axes["params"], "rates": axes["params"]}}
    return episodic(task, by_gradient(task, adapting, steps, through), support, who="meta_sgd")._replace(init=init, axes=axes)


def example() -> Example:
    return Example(meta_sgd(small_classifier(batch=4), 0.1, steps=2))
