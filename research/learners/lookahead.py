"""Slow weights that follow the fast ones every few steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from research.core.types import Batch, Example, Key, Learner, Metrics, State, Variables
from research.estimates._example import linear_regression
from research.learners.gradient import gradient

NAME = "lookahead"


def lookahead(learner: Learner, every: int = 5, alpha: float = 0.5) -> Learner:
    """Lookahead (Zhang, Lucas, Hinton and Ba 2019, arXiv 1907.08610, algorithm 1): after every `every` steps of `learner`,
    slow <- slow + alpha (params - slow), and params <- slow. `variables` gives the slow weights.

    The optimizer's state goes on as it is. Slow weights are kept in float32 or wider; "state" is that of the last params.

    State: that of `learner`, which must have "params" at its top, and "lookahead": {"params", "count" int32, of steps}. Raises
    ValueError: every below 1, alpha outside (0, 1], a learner without "params" or with a "lookahead" already.
    """
    if every < 1:
        raise ValueError(f"lookahead: every={every}; allowed: 1 or more")
    if not 0 < alpha <= 1:
        raise ValueError(f"lookahead: alpha={alpha}; allowed: above 0, 1 at most")
    if "params" not in learner.axes or NAME in learner.axes:
        raise ValueError(f'lookahead: needs a State with "params" and no "{NAME}" at its top, got {", ".join(learner.axes)}')

    def init(key: Key, variables: Variables | None = None) -> State:
        state = learner.init(key) if variables is None else learner.init(key, variables)
        # a copy: a State that is donated holds no buffer twice
        slow = jax.tree.map(lambda p: jnp.array(p, jnp.promote_types(p.dtype, jnp.float32)), state["params"])
        return {**state, NAME: {"params": slow, "count": jnp.zeros((), jnp.int32)}}

    def step(state: State, batch: Batch, key: Key) -> tuple[State, Metrics]:
        kept = state[NAME]
        new, metrics = learner.step({k: v for k, v in state.items() if k != NAME}, batch, key)
        count = kept["count"] + 1
        now = count % every == 0
        slow = jax.tree.map(lambda s, p: jnp.where(now, s + alpha * (p.astype(s.dtype) - s), s), kept["params"], new["params"])
        fast = jax.tree.map(lambda s, p: jnp.where(now, s.astype(p.dtype), p), slow, new["params"])
        return {**new, "params": fast, NAME: {"params": slow, "count": count}}, metrics

    def variables(state: State) -> Variables:
        last = learner.variables({k: v for k, v in state.items() if k != NAME})
        slow = jax.tree.map(lambda s, p: s.astype(p.dtype), state[NAME]["params"], state["params"])
        return {**last, "params": slow}

    axes = {**learner.axes, NAME: {"params": learner.axes["params"], "count": jax.P()}}
    return learner._replace(init=init, step=step, variables=variables, axes=axes)


def example() -> Example:
    return Example(lookahead(gradient(linear_regression(), optax.sgd(0.1, momentum=0.9)), 3, 0.5))
