"""The last link of every optimizer: weight decay, learning rate and schedule, as named leaves of its state.

The state is {"count", "factor", "learning_rate", "weight_decay"} and, for groups that have their own,
"learning_rate_<name>" and "weight_decay_<name>". The leaves are peaks; the schedule is a factor of them, so they can be
varied over a population, set by a search or by population based training, and logged, while the schedule runs
(`optax.inject_hyperparams` calls a schedule at every step and writes over what was set: optax issues 964 and 1373).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import optax

from research.core.tree import Path, joined, leaves_with_paths, map_with_path
from research.core.types import Array, Tree
from research.optim.groups import Group, assign
from research.optim.schedules import Schedule

RATE, DECAY = "learning_rate", "weight_decay"


def own_values(learning_rate: float, weight_decay: float, groups: Sequence[Group]) -> dict[str, float]:
    """{name of a leaf of the state: its first value}."""
    own = {RATE: learning_rate, DECAY: weight_decay}
    own |= {f"{RATE}_{g.name}": g.learning_rate for g in groups if g.learning_rate is not None}
    own |= {f"{DECAY}_{g.name}": g.weight_decay for g in groups if g.weight_decay is not None}
    return own


def scale_by_rates(
    learning_rate: float, weight_decay: float, schedule: Schedule, groups: Sequence[Group] = ()
) -> optax.GradientTransformation:
    """u -> -r f(count) (u + d p), r and d the learning rate and weight decay of the parameter's group, f the schedule of
    peak 1.

    The decay is decoupled from the gradient and scaled by the learning rate (Loshchilov and Hutter 2019, arXiv 1711.05101, as
    PyTorch and optax have it). State: scalars, count int32, the rest float32; "factor" is f at the last update. Raises
    ValueError in `init` where a group takes no parameter, in `update` where params are missing.
    """
    peaks = own_values(learning_rate, weight_decay, groups)

    def init(params: Tree) -> dict[str, Array]:
        assign(params, groups)
        leaves = {name: jnp.float32(value) for name, value in peaks.items()}
        return {"count": jnp.int32(0), "factor": jnp.float32(schedule(0)), **leaves}

    def update(updates: Tree, state: dict[str, Array], params: Tree | None = None):
        if params is None:
            raise ValueError("optimizer: update needs params, for weight decay and groups")
        factor = schedule(state["count"])
        values = assign(params, groups)

        def one(path: Path, u: Array, p: Array) -> Array:
            own = values[path]
            return -(state[own.learning_rate] * own.factor * factor) * (u + state[own.weight_decay] * p)

        new = map_with_path(one, updates, params)
        return new, {**state, "count": optax.safe_increment(state["count"]), "factor": factor}

    return optax.GradientTransformation(init, update)


def rates(opt_state: Tree) -> dict[str, Array]:
    """{"learning_rate": as used by the last update, ...} of any optimizer state with `scale_by_rates` in it, to be
    logged: the leaves times the schedule's factor. Weight decays are as they stand. Stacked over a population where the
    state is; named by the whole path where the state has several (a game's)."""
    leaves = dict(leaves_with_paths(opt_state))
    ends = [path[:-1] for path in leaves if path[-1] == "factor" and (*path[:-1], RATE) in leaves]
    found = {}
    for path, leaf in leaves.items():
        if path[:-1] in ends and path[-1].startswith((RATE, DECAY)):
            name = path[-1] if len(ends) == 1 else joined(path)
            found[name] = leaf * leaves[(*path[:-1], "factor")] if path[-1].startswith(RATE) else leaf
    return found
