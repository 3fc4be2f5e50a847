"""Several players on one set of variables, each following its own loss: adversarial training of every kind."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from research.core.contracts import abstract_batch, check_same, check_task
from research.core.names import choose
from research.core.types import (
    Array,
    Aux,
    Batch,
    Estimate,
    Example,
    Key,
    Learner,
    Method,
    Metrics,
    Spec,
    State,
    Task,
    Tree,
    Variables,
)
from research.estimates import exact
from research.learners._update import axes_of, begun, loss_metric, norm, player, strong, variables_of

Players = Mapping[str, tuple[Task, optax.GradientTransformation, Estimate]]
UPDATES = {"simultaneous": False, "alternating": True}


def _seen(name: str, tree: Tree) -> Tree:
    """Variables (or their axes) as one player has them: its own params and state, and what the others own among frozen."""
    others = {group: {k: v for k, v in tree[group].items() if k != name} for group in ("params", "state")}
    frozen = {"frozen": tree["frozen"], "others": others}
    return {"params": tree["params"][name], "state": tree["state"].get(name, {}), "frozen": frozen}


def _whole(name: str, own: Tree, stateful: bool) -> Tree:
    """The inverse of `_seen`; `stateful` where the player owns a part of state."""
    others = own["frozen"]["others"]
    state = {**others["state"], name: own["state"]} if stateful else others["state"]
    return {"params": {**others["params"], name: own["params"]}, "state": state, "frozen": own["frozen"]["frozen"]}


def _own(task: Task, name: str, abstract: Variables) -> Task:
    """The task as one player sees it, so that any estimate differentiates, perturbs and merges what it owns alone."""
    stateful = name in abstract["state"]

    def loss(variables: Variables, batch: Batch, key: Key) -> tuple[Array, Aux]:
        value, aux = task.loss(_whole(name, variables, stateful), batch, key)
        return value, aux._replace(state=aux.state.get(name, {}))

    merge = {path.removeprefix(f"{name}/"): rule for path, rule in task.merge.items() if path.startswith(f"{name}/")}
    return Task(lambda key: _seen(name, task.init(key)), loss, {}, task.batch, _seen(name, axes_of(task, abstract)), merge)


def _agreed(players: Players) -> Variables:
    """The abstract variables that all tasks share. Raises ValueError where they do not fit each other or their players."""
    if not players:
        raise ValueError("game: no players given")
    abstract = {name: check_task(task, methods=False) for name, (task, _, _) in players.items()}
    first = next(iter(players))
    for name, (task, _, _) in players.items():
        beside = f"of {name!r}, beside that of {first!r}"
        check_same(abstract[first], abstract[name], f"game: init {beside}")
        check_same(abstract_batch(players[first][0].batch), abstract_batch(task.batch), f"game: batch {beside}")
    params, state = (sorted(abstract[first][group]) for group in ("params", "state"))
    if params != sorted(players):
        raise ValueError(f"game: params have the subtrees {params}; allowed: one a player, {sorted(players)}")
    if not set(state) <= set(players):
        raise ValueError(f"game: state has the subtrees {state}; allowed: one a player, {sorted(players)}")
    return abstract[first]


def _methods(players: Players) -> dict[str, Method]:
    methods: dict[str, Method] = {}
    for player_name, (task, _, _) in players.items():
        for name, method in task.methods.items():
            if methods.setdefault(name, method).apply is not method.apply:
                raise ValueError(f"game: {player_name!r} defines the method {name!r} otherwise than another player")
    return methods


def game(players: Mapping[str, tuple[Task, optax.GradientTransformation, Estimate]], updates: str = "simultaneous") -> Learner:
    """Each player follows the gradient of its own task's loss in the params that it owns.

    players: {name: (task, tx, estimate)}. All tasks have the same Variables and batch (and init: the first task's is used), and
    every loss sees all of them: params {name: subtree} and state {name: subtree}. A player owns the subtrees of its name: its
    gradient is taken in those params alone, and of the state its loss returns only that subtree is kept. frozen is everyone's.

    updates: "simultaneous", all at the same variables, or "alternating", in the order given, each seeing those before it moved.

    State: "step", "params", "state", "frozen", "opt" {name: …}, "memory" {name: …}. Metrics: for each player "<name>/loss",
    "<name>/grad_norm" and those of its task; "loss" is the sum of the players' losses. Methods: those of all tasks together.

    Raises ValueError: tasks whose variables or batches differ, subtrees that no player owns, a method defined in two ways.
    """
    in_turn = choose(UPDATES, updates, "game: updates")
    abstract, methods = _agreed(players), _methods(players)
    first = next(iter(players.values()))[0]
    movers = {name: player(_own(task, name, abstract), tx, estimate) for name, (task, tx, estimate) in players.items()}

    def init(key: Key, variables: Variables | None = None) -> State:
        k_variables, k_memory = jax.random.split(key)
        variables = strong(begun(first, abstract, k_variables, variables))
        made = {
            name: mover.begin(_seen(name, variables), jax.random.fold_in(k_memory, i))
            for i, (name, mover) in enumerate(movers.items())
        }
        opt, memory = ({name: pair[i] for name, pair in made.items()} for i in (0, 1))
        return {"step": jnp.zeros((), jnp.int32), **variables, "opt": opt, "memory": memory}

    def step(state: State, batch: Batch, key: Key) -> tuple[State, Metrics]:
        new = {**state, **{group: dict(state[group]) for group in ("params", "state", "opt", "memory")}}
        metrics: dict[str, tuple[Array, Array]] = {}
        total = jnp.zeros(())
        for i, (name, mover) in enumerate(movers.items()):
            variables = _seen(name, variables_of(new if in_turn else state))
            moved = mover.move(variables, state["opt"][name], state["memory"][name], batch, jax.random.fold_in(key, i))
            new["params"][name], new["opt"][name], new["memory"][name] = moved.params, moved.opt, moved.memory
            if name in state["state"]:
                new["state"][name] = moved.aux.state
            grad_norm, loss = norm(jax.tree.leaves(moved.grads)), loss_metric(moved.loss, moved.aux.weight)
            own = {**moved.aux.metrics, "loss": loss, "grad_norm": (grad_norm, jnp.ones_like(grad_norm))}
            metrics |= {f"{name}/{k}": pair for k, pair in own.items()}
            total = total + moved.loss
        new["step"] = state["step"] + 1
        return new, {**metrics, "loss": (total, jnp.ones_like(total))}

    axes = axes_of(first, abstract)
    made = {name: mover.axes(_seen(name, abstract), _seen(name, axes)) for name, mover in movers.items()}
    opt, memory = ({name: pair[i] for name, pair in made.items()} for i in (0, 1))
    axes = {"step": jax.P(), **axes, "opt": opt, "memory": memory}
    return Learner(init, step, variables_of, methods, first.batch, axes)


def _shifting() -> dict[str, Task]:
    """A generator that shifts noise towards data [batch], against a discriminator that is a line: each other's gradients
    matter."""
    spec = Spec((8,), jnp.float32, ("batch",))

    def init(key: Key) -> Variables:
        params = {"generator": {"shift": jnp.ones(())}, "discriminator": {"slope": jnp.ones(()), "offset": jnp.zeros(())}}
        state = {"discriminator": {"real": jnp.zeros(())}}
        return {"params": params, "state": state, "frozen": {"spread": jnp.full((), 0.1)}}

    def generate(variables: Variables, inputs: Tree, key: Key) -> Array:
        return variables["params"]["generator"]["shift"] + variables["frozen"]["spread"] * inputs["noise"]

    def scores(variables: Variables, x: Array) -> Array:
        line = variables["params"]["discriminator"]
        return line["slope"] * x + line["offset"]

    def of_discriminator(variables: Variables, batch: Batch, key: Key) -> tuple[Array, Aux]:
        fake = generate(variables, {"noise": batch["noise"]}, key)
        loss = jax.nn.softplus(-scores(variables, batch["data"])) + jax.nn.softplus(scores(variables, fake))
        weight = jnp.full((), float(loss.shape[0]))
        real = 0.9 * variables["state"]["discriminator"]["real"] + 0.1 * batch["data"].mean()
        return loss.mean(), Aux({"discriminator": {"real": real}}, {"real": (batch["data"].sum(), weight)}, weight)

    def of_generator(variables: Variables, batch: Batch, key: Key) -> tuple[Array, Aux]:
        fake = generate(variables, {"noise": batch["noise"]}, key)
        loss, weight = jax.nn.softplus(-scores(variables, fake)), jnp.full((), float(batch["noise"].shape[0]))
        return loss.mean(), Aux(variables["state"], {}, weight)

    methods, batch = {"generate": Method(generate, {"noise": spec})}, {"data": spec, "noise": spec}
    losses = {"discriminator": of_discriminator, "generator": of_generator}
    return {name: Task(init, loss, methods, batch) for name, loss in losses.items()}


def example() -> Example:
    return Example(game({name: (task, optax.sgd(0.1), exact()) for name, task in _shifting().items()}, updates="alternating"))
