"""An exponential moving average of params beside those being trained."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from research.core.types import Batch, Example, Key, Learner, Metrics, State, Variables
from research.estimates._example import linear_regression
from research.learners.gradient import gradient

NAME = "average"


def average(learner: Learner, decay: float) -> Learner:
    """`variables` gives the moving average of params instead of the last ones, which go on being trained.

    After t steps the average is sum_i (1 - decay) decay^(t-i) params_i / (1 - decay^t), the bias correction of Kingma & Ba
    2015, section 3; before the first step it is params. It is kept in float32 or wider and given in the dtypes of params.
    "state" is not averaged: batch statistics belong to the last params, and a `forward` stage measures them anew.

    State: that of `learner`, which must have "params" at its top, and "average": {"params", "count" int32}. Raises ValueError:
    decay outside [0, 1), a learner without "params", a learner that is averaged already.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"average: decay={decay}; allowed: 0 or more, below 1")
    if "params" not in learner.axes or NAME in learner.axes:
        raise ValueError(f'average: needs a State with "params" and no "{NAME}" at its top, got {", ".join(learner.axes)}')

    def init(key: Key, variables: Variables | None = None) -> State:
        state = learner.init(key) if variables is None else learner.init(key, variables)
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), state["params"])
        return {**state, NAME: {"params": zeros, "count": jnp.zeros((), jnp.int32)}}

    def step(state: State, batch: Batch, key: Key) -> tuple[State, Metrics]:
        kept = state[NAME]
        new, metrics = learner.step({k: v for k, v in state.items() if k != NAME}, batch, key)
        params = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p.astype(a.dtype), kept["params"], new["params"])
        return {**new, NAME: {"params": params, "count": kept["count"] + 1}}, metrics

    def variables(state: State) -> Variables:
        count = state[NAME]["count"]
        # -expm1(count log decay) is 1 - decay^count without cancellation, for decays such as 0.99999
        mass = -jnp.expm1(count * jnp.log(decay)) if decay else jnp.ones(())

        def corrected(a, p):
            return jnp.where(count > 0, a / jnp.where(count > 0, mass, 1).astype(a.dtype), p).astype(p.dtype)

        last = learner.variables({k: v for k, v in state.items() if k != NAME})
        return {**last, "params": jax.tree.map(corrected, state[NAME]["params"], state["params"])}

    axes = {**learner.axes, NAME: {"params": learner.axes["params"], "count": jax.P()}}
    return learner._replace(init=init, step=step, variables=variables, axes=axes)


def example() -> Example:
    return Example(average(gradient(linear_regression(), optax.sgd(0.1)), 0.9))
