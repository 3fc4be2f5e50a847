"""Many runs as one: every leaf of the State with a leading axis of members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.core.axes import POPULATION
from research.core.contracts import abstract_key, check_variables
from research.core.mesh import axes_of
from research.core.names import choose, suggestion
from research.core.tree import Path, joined, leaves_with_paths, map_with_path
from research.core.types import Batch, Example, Key, Learner, Metrics, State, Tree, Variables
from research.estimates._example import linear_regression
from research.learners.gradient import gradient

METHODS = {"vmap": "all members in one program", "map": "one member after another"}
FROZEN = {"shared": None, "own": 0}


def lanes(frozen: str) -> dict[str, int | None]:
    """`in_axes` of Variables of a population: {group: 0, or None where "frozen" is shared}."""
    return {"params": 0, "state": 0, "frozen": choose(FROZEN, frozen, "population: frozen")}


def _is_named(path: Path, name: str) -> bool:
    """Whether the path ends with the last part of `name` and holds the parts before it in that order."""
    *before, last = name.split("/")
    rest = iter(path[:-1])
    return bool(path) and path[-1] == last and all(part in rest for part in before)


def hyperparameter(state: State, name: str, what: str = "vary") -> Path:
    """The path of the one leaf of a State that is called `name`: its last key, or last key and some before it, as in
    "generator/learning_rate". Raises ValueError (one line, beginning with `what`) where there is none or more than one."""
    paths = [path for path, _ in leaves_with_paths(state)]
    found = [path for path in paths if _is_named(path, name)]
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(map(joined, found[:4]))
        raise ValueError(
            f"{what}[{name!r}]: {len(found)} leaves are called so, {listed}; name one, with keys before it, as a/b"
        )
    names = sorted({path[-1] for path in paths})
    raise ValueError(f"{what}[{name!r}]: no leaf of the State is called so{suggestion(name, names)}")


def population(
    learner: Learner,
    n: int,
    vary: Mapping[str, Sequence[float]] | None = None,
    *,
    method: str = "vmap",
    frozen: str = "shared",
) -> Learner:
    """`n` members of one learner, on the same batches, each from its own key.

    Every leaf of State and of variables is stacked [n, *shape], except the one "step" and, where `frozen` is "shared", "frozen"
    (member 0's); "own" gives each member its own. Metrics are (sum [n], weight [n]). Methods take stacked variables and one set
    of inputs and key, and give outputs [n, …].

    vary: {name: n values} of a hyperparameter, the leaf of the State whose last key is `name`, such as "learning_rate" of
        `optax.inject_hyperparams`; with further keys before it where the last is not unique ("generator/learning_rate").
    method: "vmap", or "map", which needs the memory of one member's step and is as fast where one fills the machine.
    Where the mesh in use lays "population" over one of its axes, each device computes its own members.

    Raises ValueError: n below 1, an unknown choice, a hyperparameter that is not there, not unique, or of another shape.
    """
    if n < 1:
        raise ValueError(f"population: n={n}; allowed: 1 or more")
    choose(METHODS, method, "population: method")
    groups = lanes(frozen)
    single = jax.eval_shape(learner.init, abstract_key())
    lane = {name: None if name == "step" else groups["frozen"] if name == "frozen" else 0 for name in single}
    values = {hyperparameter(single, name): _values(single, name, given, n, groups) for name, given in (vary or {}).items()}

    def keys(key: Key) -> Key:
        return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n))  # member i's does not depend on n

    def init(key: Key, variables: Variables | None = None) -> State:
        if variables is None:
            state = jax.vmap(learner.init)(keys(key))
        else:
            check_variables(variables, abstract, "population: variables")
            state = jax.vmap(learner.init, (0, groups), axis_size=n)(keys(key), variables)
        state = {name: jax.tree.map(lambda x: x[0], x) if lane[name] is None else x for name, x in state.items()}
        return map_with_path(lambda path, x: jnp.asarray(values[path], x.dtype) if path in values else x, state)

    def step(state: State, batch: Batch, key: Key) -> tuple[State, Metrics]:
        if method == "vmap":
            mapped = jax.vmap(learner.step, (lane, None, 0), (lane, 0), axis_size=n, spmd_axis_name=over_mesh())
            return mapped(state, batch, keys(key))
        shared = {name: x for name, x in state.items() if lane[name] is None}

        def one(member):
            own, key = member
            new, metrics = learner.step({**shared, **own}, batch, key)
            return {name: x for name, x in new.items() if name == "step" or lane[name] == 0}, metrics

        own = {name: x for name, x in state.items() if lane[name] == 0}
        new, metrics = jax.lax.map(one, (own, keys(key)))
        return {**shared, **new, "step": new["step"][0]}, metrics

    def variables(state: State) -> Variables:
        return jax.vmap(learner.variables, (lane,), groups, axis_size=n)(state)

    def lifted(apply):
        def each(variables, inputs, key):
            mapped = jax.vmap(apply, (groups, None, None), axis_size=n, spmd_axis_name=over_mesh())
            return mapped(variables, inputs, key)

        return each

    abstract = jax.eval_shape(lambda key: variables(init(key)), abstract_key())
    methods = {name: m._replace(apply=lifted(m.apply)) for name, m in learner.methods.items()}
    axes = {name: x if lane[name] is None else _stacked(x) for name, x in learner.axes.items()}
    return Learner(init, step, variables, methods, learner.batch, axes)


def over_mesh() -> tuple[str, ...] | None:
    """The mesh axes of the members, for `jax.vmap`: unless it is told, a shard_map or a sharding constraint within the task
    makes every device compute all of them. Not under a pipeline, whose shard_map leaves these axes to the compiler, and raises
    where it is told of them."""
    return None if axes_of("layers") else axes_of(POPULATION) or None


def _stacked(axes: Tree) -> Tree:
    return jax.tree.map(lambda a: jax.P(POPULATION, *a), axes)


def _values(state: State, name: str, given: Sequence[float], n: int, groups: Mapping[str, int | None]) -> np.ndarray:
    """The values of a hyperparameter, [n, *its shape]. Raises ValueError where they do not fit it."""
    path, values = hyperparameter(state, name), np.asarray(given)
    leaf = dict(leaves_with_paths(state))[path]
    if path[0] == "step" or (path[0] == "frozen" and groups["frozen"] is None):
        raise ValueError(f"vary[{name!r}]: {joined(path)} is shared by all members and cannot vary")
    if values.shape != (n, *leaf.shape):
        raise ValueError(f"vary[{name!r}]: expected {(n, *leaf.shape)} values, one a member, got {values.shape}")
    return values


def example() -> Example:
    learner = gradient(linear_regression(), optax.inject_hyperparams(optax.sgd)(learning_rate=0.1))
    return Example(population(learner, 3, {"learning_rate": (0.01, 0.1, 0.2)}))
