"""Learning where to start."""

from __future__ import annotations

import optax

from research.core.types import Example, Task
from research.transforms._adapting import Adapting, by_gradient, check_optimizer, check_steps, chosen, episodic
from research.transforms._example import small_classifier


def maml(
    task: Task,
    inner_tx: optax.GradientTransformation = optax.sgd(0.01),
    steps: int = 1,
    *,
    order: str = "second",
    truncation: int | None = None,
    support: int | None = None,
) -> Task:
    """The loss of a query after `steps` steps of `inner_tx` on a support, from params that are learned (Finn et al. 2017, arXiv
    1703.03400, equation 1 with algorithm 1). Batches are {"support": task.batch, of `support` rows where that is given,
    "query": task.batch}; `over_tasks(maml(task), n)` takes n of them.

    order: "second", the gradient of the loss; "first", which takes the inner gradients as constants (section 5.2 there).
    truncation: how many of the last steps are followed to second order, the others to first; None for all. One `lax.scan` in
        either case, whose backward pass keeps as many copies of what adapts as steps are followed.

    Variables are the task's own. Methods: the task's, on {"support", "query"} after adaptation, such as predict; adapt
    {"support"} -> {"params" after the steps, "losses" [steps] before each}. Aux.weight is the query's, which an estimate may
    split. Every other optimizer of optax will do as `inner_tx`; its state begins anew in every episode.

    Raises ValueError (one line): steps below 1, an unknown order, a truncation that is not from 1 to steps, an `inner_tx` that
    is no optax transformation.
    """
    check_optimizer("maml", inner_tx)
    through = check_steps("maml", steps, order, truncation)
    start, whole = chosen(task, "", "maml")
    adapting = Adapting(start, whole, lambda params: inner_tx)
    return episodic(task, by_gradient(task, adapting, steps, through), support, who="maml")


def example() -> Example:
    return Example(maml(small_classifier(batch=4), optax.sgd(0.1), steps=3))
