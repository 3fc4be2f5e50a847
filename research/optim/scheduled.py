"""Optimizers of optax that must know the schedule, around a chain that ends in `scale_by_rates`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import ScheduleFreeState, prodigy, schedule_free

from research.core.types import Array, Tree
from research.optim._matrices import wide
from research.optim.schedules import Schedule

Around = Callable[[optax.GradientTransformation, Schedule], optax.GradientTransformation]


def schedule_free_of(b1: float, power: float) -> Around:
    """`optax.contrib.schedule_free` of the chain. Iterates are weighted by the schedule to the `power`: the peak, which the
    State keeps and a population may vary, cancels. Raises ValueError where b1 is not above 0 and below 1."""
    if not 0 < b1 < 1:
        raise ValueError(f"optimizer.b1={b1} is out of range for schedule_free: above 0, below 1")

    def around(tx: optax.GradientTransformation, schedule: Schedule) -> optax.GradientTransformation:
        return schedule_free(tx, lambda count: schedule(count - 1), b1, power)  # optax counts from 1 here

    return around


def evaluated(opt_state: Tree, params: Tree) -> Tree:
    """The params to evaluate and export, of those being trained: the average x of an optimizer that is schedule-free, else the
    params as they are."""
    found = [s for s in jax.tree.leaves(opt_state, is_leaf=_is_schedule_free) if _is_schedule_free(s)]
    return params if not found else _average(found[0], params)


def _is_schedule_free(x: Any) -> bool:
    return isinstance(x, ScheduleFreeState)


def _average(state: ScheduleFreeState, params: Tree) -> Tree:
    """x of y = b1 x + (1 - b1) z; y itself where there was no step, so that rounding does not move it."""

    def one(y: Array, z: Array) -> Array:
        b1 = state.b1.astype(y.dtype)
        return jnp.where(state.step_count > 1, (y - (1 - b1) * z) / b1, y).astype(y.dtype)

    return jax.tree.map(one, params, state.z)


def prodigy_of(**options: Any) -> Around:
    """`optax.contrib.prodigy` with the schedule in its estimate, as published, before the rest of the chain. A constant
    learning rate cancels in the estimate, so the one in the State, which a population may vary, is left to `scale_by_rates`.
    Its state is float32 or wider, whatever the params are."""

    def around(tx: optax.GradientTransformation, schedule: Schedule) -> optax.GradientTransformation:
        inner = prodigy(schedule, **options)

        def wide_tree(tree: Tree) -> Tree:
            return jax.tree.map(lambda x: x.astype(wide(x)), tree)

        def init(params: Tree) -> dict[str, Any]:
            return {"prodigy": inner.init(wide_tree(params)), "chain": tx.init(params)}

        def update(updates: Tree, state: dict[str, Any], params: Tree | None = None):
            factor = schedule(state["prodigy"].count)
            moved, new = inner.update(wide_tree(updates), state["prodigy"], wide_tree(params))
            # `scale_by_rates` turns the sign and multiplies by the schedule again
            direction = jax.tree.map(lambda u: -u / jnp.where(factor == 0, 1, factor).astype(u.dtype), moved)
            out, after = tx.update(direction, state["chain"], params)
            return out, {"prodigy": new, "chain": after}

        return optax.GradientTransformation(init, update)

    return around
