"""A function of the variables and the whole step's metrics, applied after each step."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from research.core.contracts import ContractError, check_same
from research.core.types import GROUPS, Batch, Example, Key, Learner, Metrics, State, Variables
from research.estimates._example import linear_regression
from research.learners._update import variables_of
from research.learners.gradient import gradient


def after_step(learner: Learner, fn: Callable[[Variables, Metrics], Variables]) -> Learner:
    """`fn(variables, metrics) -> variables` after every step: weight constraints, the balancing of experts, and what else must
    see the sums of a whole step, all of its microbatches and shards, rather than one loss.

    variables: those being trained ("params", "state", "frozen" at the top of the State), stacked in a population, and not the
    average of `average`. metrics: {name: (sum, weight)}. "frozen" must be handed back as it was given.

    Raises ValueError: a learner without these at its top, an fn that changes "frozen" or the form of the others.
    """
    missing = [group for group in GROUPS if group not in learner.axes]
    if missing:
        raise ValueError(f"after_step: needs a State with {', '.join(GROUPS)} at its top, got {', '.join(learner.axes)}")

    def step(state: State, batch: Batch, key: Key) -> tuple[State, Metrics]:
        new, metrics = learner.step(state, batch, key)
        before = variables_of(new)
        after = fn(before, metrics)
        check_same(before, after, "after_step: what fn returns")
        if any(a is not b for a, b in zip(jax.tree.leaves(before["frozen"]), jax.tree.leaves(after["frozen"]))):
            raise ContractError('after_step: fn changes "frozen"; expected it untouched')
        return {**new, "params": after["params"], "state": after["state"]}, metrics

    return learner._replace(step=step)


def example() -> Example:
    """Weights kept in [-1, 1]."""

    def clipped(variables: Variables, metrics: Metrics) -> Variables:
        return {**variables, "params": jax.tree.map(lambda p: jnp.clip(p, -1, 1), variables["params"])}

    return Example(after_step(gradient(linear_regression(), optax.sgd(0.1)), clipped))
