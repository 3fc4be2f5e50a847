"""Steps that would leave something not finite are not taken."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from research.core.types import Batch, Example, Key, Learner, Metrics, State
from research.estimates._example import linear_regression
from research.learners.gradient import gradient

OUTSIDE = ("step", "frozen")


def skip_nonfinite(learner: Learner) -> Learner:
    """The State stays as it was, but for "step", where the loss is not finite or a number of the State stops being so.

    A number that was infinite or NaN before (the best loss so far, say) is no reason. Metrics of a skipped step count nothing,
    sum and weight 0, but for "skipped", (1, 1) then and else (0, 1). Inside a population (`population(skip_nonfinite(learner),
    n)`) one member's NaN stops that member alone; outside, it stops all of them.
    """

    def step(state: State, batch: Batch, key: Key) -> tuple[State, Metrics]:
        new, metrics = learner.step(state, batch, key)
        moving = {k: v for k, v in state.items() if k not in OUTSIDE}
        moved = {k: new[k] for k in moving}
        checks = [jnp.isfinite(x).all() for x in metrics["loss"]]
        for old, x in zip(jax.tree.leaves(moving), jax.tree.leaves(moved)):
            if jnp.issubdtype(x.dtype, jnp.inexact):
                checks.append((jnp.isfinite(x) | ~jnp.isfinite(old)).all())
        ok = jnp.stack(checks).all()
        kept = jax.tree.map(lambda x, old: jnp.where(ok, x, old), moved, moving)
        metrics = jax.tree.map(lambda x: jnp.where(ok, x, jnp.zeros_like(x)), dict(metrics))
        skipped = jnp.where(ok, 0.0, 1.0)
        return {**state, **kept, "step": new["step"]}, {**metrics, "skipped": (skipped, jnp.ones_like(skipped))}

    return learner._replace(step=step)


def example() -> Example:
    return Example(skip_nonfinite(gradient(linear_regression(), optax.sgd(0.1))))
