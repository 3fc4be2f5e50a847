"""Several tasks, one set of params."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from research.core.contracts import abstract_batch, abstract_key, abstract_variables, described
from research.core.names import choose
from research.core.tree import Path, joined, leaves_with_paths, nested
from research.core.types import Aux, Batch, Example, Key, Method, Task, Tree, Variables
from research.transforms._example import small_classifier
from research.transforms._trees import axes_of

PER = {"task": "sum of weight x loss", "example": "mean over all examples, each times its task's weight"}


def mixture(tasks: Mapping[str, tuple[Task, float]], *, private: str = "", per: str = "task") -> Task:
    """{name: (task, weight)} as one Task on {name: batch}, whose "batch" axes are of one size.

    params: the union of the tasks' by path. A path that several have is one array for all of them, so equal networks share
        everything and networks with equal trunks share these; paths in which the regular expression `private` is found
        stay apart, under params[name]. The first task by name that has an array draws it.
    state, frozen: {name: the task's own}.
    loss: per "task", sum of weight_i x loss_i; that is no mean over a batch, so Aux.weight is None and nothing may split it.
        Per "example", sum of weight_i w_i loss_i / sum of weight_i w_i, with w_i the task's Aux.weight: it can be split.
    metrics: "<name>/<metric>" and "<name>/loss". methods: "<name>/<method>".

    Raises ValueError (one line): no task, a weight below 0 or all of them 0, arrays of one path that differ in shape,
    dtype or axes, a name that is also the first key of a shared path, `private` that is in no path, per="example" of a
    task whose Aux.weight is None.
    """
    choose(PER, per, "mixture: per")
    names = sorted(tasks)
    weights = {name: float(tasks[name][1]) for name in names}
    if not names or any(w < 0 for w in weights.values()) or not any(weights.values()):
        raise ValueError(f"mixture: weights {weights}; allowed: 0 or more, and at least one above 0")
    each = {name: tasks[name][0] for name in names}
    abstract = {name: abstract_variables(task) for name, task in each.items()}
    homes = _homes(abstract, private)
    union = {home: name for name in reversed(names) for home in homes[name].values()}  # who draws each array

    def view(variables: Variables, name: str) -> Variables:
        flat = dict(leaves_with_paths(variables["params"]))
        params = nested((path, flat[home]) for path, home in homes[name].items())
        return {"params": params, "state": variables["state"][name], "frozen": variables["frozen"][name]}

    def combined(per_task: Mapping[str, Any]) -> dict[str, Any]:
        flat = {name: dict(leaves_with_paths(v["params"])) for name, v in per_task.items()}
        own = {home: flat[name][path] for name in names for path, home in homes[name].items() if union[home] == name}
        return {
            "params": nested(own.items()),
            "state": {name: v["state"] for name, v in per_task.items()},
            "frozen": {name: v["frozen"] for name, v in per_task.items()},
        }

    def init(key: Key) -> Variables:
        return combined({name: each[name].init(jax.random.fold_in(key, i)) for i, name in enumerate(names)})

    def loss(variables: Variables, batch: Batch, key: Key) -> tuple[jax.Array, Aux]:
        value, weight = jnp.zeros(()), jnp.zeros(())
        state: dict[str, Tree] = {}
        found: dict[str, tuple[jax.Array, jax.Array]] = {}
        for i, name in enumerate(names):
            own, aux = each[name].loss(view(variables, name), batch[name], jax.random.fold_in(key, i))
            counts = jnp.ones_like(own) if aux.weight is None else aux.weight
            total = jnp.where(counts > 0, own * counts, 0)
            value = value + weights[name] * (own if per == "task" else total)
            weight = weight + weights[name] * counts
            state[name] = aux.state
            found |= {f"{name}/{metric}": pair for metric, pair in aux.metrics.items()} | {f"{name}/loss": (total, counts)}
        if per == "task":
            return value, Aux(state, found, None)
        return value / jnp.where(weight > 0, weight, 1), Aux(state, found, weight)

    def lifted(name: str, method: Method) -> Method:
        return method._replace(apply=lambda v, inputs, key: method.apply(view(v, name), inputs, key))

    mixed = Task(
        init,
        loss,
        {f"{name}/{m}": lifted(name, method) for name in names for m, method in each[name].methods.items()},
        {name: task.batch for name, task in each.items()},
        combined(_axes(each, homes)),
        {f"{name}/{path}": rule for name, task in each.items() for path, rule in task.merge.items()},
    )
    if per == "example":
        _check_weights(each, abstract)
    return mixed


def _homes(abstract: Mapping[str, Variables], private: str) -> dict[str, dict[Path, Path]]:
    """{name: {path in the task's params: path in the mixture's}}, checked."""
    try:
        found = re.compile(private)
    except re.error as error:
        raise ValueError(f"mixture: private={private!r} is no regular expression: {error}") from None
    homes: dict[str, dict[Path, Path]] = {}
    owner: dict[Path, tuple[str, Any]] = {}
    apart = 0
    for name, variables in abstract.items():
        homes[name] = {}
        for path, x in leaves_with_paths(variables["params"]):
            own = bool(private) and found.search(joined(path)) is not None
            apart += own
            home = homes[name][path] = (name, *path) if own else path
            if not own and path[0] in abstract:
                raise ValueError(
                    f"mixture: the name {path[0]!r} is also the first key of params {joined(path)}; rename the task"
                )
            first, y = owner.setdefault(home, (name, x))
            if (x.shape, x.dtype) != (y.shape, y.dtype):
                found_both = f"{described(y)} in {first} and {described(x)} in {name}"
                raise ValueError(f"mixture: params {joined(path)} is {found_both}; allowed: equal, or private")
    for path, (name, _) in owner.items():
        inner = next((p for p in owner if p[: len(path)] == path and p != path), None)
        if inner is not None:
            raise ValueError(
                f"mixture: params {joined(path)} is an array in {name} and holds {joined(inner)} in {owner[inner][0]}"
            )
    if private and not apart:
        raise ValueError(f"mixture: private={private!r} is in no path of params")
    return homes


def _axes(each: Mapping[str, Task], homes: Mapping[str, Mapping[Path, Path]]) -> dict[str, Tree]:
    """Axes of each task, where they agree on what they share."""
    axes = {name: axes_of(task) for name, task in each.items()}
    seen: dict[Path, tuple[str, Any]] = {}
    for name, own in axes.items():
        for path, names in leaves_with_paths(own["params"]):
            first, before = seen.setdefault(homes[name][path], (name, names))
            if before != names:
                raise ValueError(
                    f"mixture: axes of params {joined(path)} are {before} in {first} and {names} in {name}; expected equal ones"
                )
    return axes


def _check_weights(each: Mapping[str, Task], abstract: Mapping[str, Variables]) -> None:
    for name, task in each.items():
        if jax.eval_shape(task.loss, abstract[name], abstract_batch(task.batch), abstract_key())[1].weight is None:
            raise ValueError(f'mixture: the loss of {name} is no weighted mean (Aux.weight is None); use per="task"')


def example() -> Example:
    one, other = small_classifier(batch=4), small_classifier(batch=4, classes=2)
    return Example(mixture({"one": (one, 1.0), "other": (other, 0.5)}, private="head", per="example"))
