"""Learning where to start, without a query."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from research.core.types import Array, Aux, Batch, Example, Key, Task, Variables
from research.transforms._adapting import Adapting, by_gradient, check_optimizer, check_steps, chosen, episodic
from research.transforms._example import small_classifier
from research.transforms._inner_loop import begin, inner_loop, stacked
from research.transforms._trees import by_step


def reptile(task: Task, inner_tx: optax.GradientTransformation = optax.sgd(0.01), steps: int = 5) -> Task:
    """A loss whose gradient is (start - end) of `steps` steps of `inner_tx`, one a batch (Nichol et al. 2018, arXiv 1803.02999,
    algorithm 1): `optax.sgd(e)` moves the start by e (end - start), `over_tasks` takes the mean over tasks (algorithm 2).

    Batches are the task's with a new first axis [steps, ...], of one and the same task. The value is the mean of the inner
    losses, each before its step; Aux.weight is None. Methods and their inputs are those of `maml`, whose steps all see one
    support. The task's state is that after the steps. Raises ValueError (one line): steps below 1,
    an `inner_tx` that is no optax transformation.
    """
    check_optimizer("reptile", inner_tx)
    through = check_steps("reptile", steps, "first")
    start, whole = chosen(task, "", "reptile")

    def loss(variables: Variables, batch: Batch, key: Key) -> tuple[Array, Aux]:
        def inner_loss(params, state, batch, key):
            return task.loss({**variables, "params": params, "state": state}, batch, key)

        params = jax.lax.stop_gradient(variables["params"])
        end, losses = inner_loop(
            inner_loss, inner_tx, begin(inner_tx, params, variables["state"]), stacked(batch), key, range(steps)
        )
        value = jax.lax.stop_gradient(losses.mean())
        moved = jax.tree.map(lambda p, q: ((p - q) ** 2).sum() / 2, variables["params"], jax.lax.stop_gradient(end.params))
        half = jnp.asarray(sum(jax.tree.leaves(moved)))  # whose gradient is start - end
        metrics = {"support_loss": (value, jnp.ones_like(value))}
        return value + half - jax.lax.stop_gradient(half), Aux(end.state, metrics, None)

    adapt = by_gradient(task, Adapting(start, whole, lambda params: inner_tx), steps, through)
    return episodic(task, adapt, None, who="reptile")._replace(loss=loss, batch=by_step(task.batch, steps))


def example() -> Example:
    why = "its gradient is the way from the end of an inner loop to its start, not that of its value, the inner losses"
    return Example(reptile(small_classifier(batch=4), optax.sgd(0.1), steps=3), exact_gradient=False, why=why)
