"""What learners share: starting variables, and one update of one set of params."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.core.axes import axes_like, replicated
from research.core.contracts import abstract_key, check_axes, check_variables
from research.core.tree import joined, leaves_with_paths
from research.core.types import GROUPS, Array, Aux, Batch, Estimate, Key, Metrics, State, Task, Tree, Variables


def variables_of(state: State) -> Variables:
    """The variables being trained, where a State keeps them at its top."""
    return {group: state[group] for group in GROUPS}


def begun(task: Task, abstract: Variables, key: Key, variables: Variables | None) -> Variables:
    """The given variables if they fit, else the task's own. Raises ContractError naming path, expected and got."""
    if variables is None:
        return task.init(key)
    check_variables(variables, abstract)
    return {group: variables[group] for group in GROUPS}


def strong(tree: Tree) -> Tree:
    """Arrays without weak types, which would make the second step compile again."""

    def one(x):
        x = jnp.asarray(x)
        return jax.lax.convert_element_type(x, x.dtype) if getattr(x, "weak_type", False) else x

    return jax.tree.map(one, tree)


def norm(leaves: list[Array]) -> Array:
    """The Euclidean norm of all of them together, float32 or wider."""
    return jnp.asarray(optax.tree.norm([x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in leaves]))


def loss_metric(loss: Array, weight: Array | None) -> tuple[Array, Array]:
    """(loss * weight, weight), the weight 1 if it is None; (0, 0) where it is 0."""
    if weight is None:
        return loss, jnp.ones_like(loss)
    return jnp.where(weight == 0, 0, loss * weight), weight


class Player(NamedTuple):
    """What moves a set of params: a task on them, an optimizer, an estimate of the gradient."""

    task: Task
    tx: optax.GradientTransformationExtraArgs
    estimate: Estimate

    def begin(self, variables: Variables, key: Key) -> tuple[Tree, Tree]:
        """(optimizer state, estimate memory)."""
        return strong(self.tx.init(variables["params"])), strong(self.estimate.init(self.task, variables, key))

    def move(self, variables: Variables, opt: Tree, memory: Tree, batch: Batch, key: Key) -> Moved:
        """One update. The optimizer is also given `value`, `grad` and `value_fn`, as optax's line searches want them."""
        params = variables["params"]
        loss, aux, grads, memory = self.estimate.grads(memory, self.task, variables, batch, key)
        updates, opt = self.tx.update(
            grads,
            opt,
            params,
            value=loss,
            grad=grads,
            value_fn=lambda p: self.task.loss({**variables, "params": p}, batch, key)[0],
        )
        return Moved(optax.apply_updates(params, updates), strong(opt), strong(memory), loss, aux, grads, updates)

    def axes(self, variables: Variables, axes: Tree) -> tuple[Tree, Tree]:
        """Axes of (optimizer state, estimate memory), from abstract variables and their axes."""
        opt, memory = jax.eval_shape(self.begin, variables, abstract_key())
        own = self.estimate.axes(self.task, memory) if self.estimate.axes is not None else None
        if own is not None:
            check_axes(own, memory, "estimate.axes")
        return axes_like(opt, variables, axes), axes_like(memory, variables, axes) if own is None else own


class Moved(NamedTuple):
    """After an update: new params, optimizer state and memory; loss and Aux before it; the gradients and what was added."""

    params: Tree
    opt: Tree
    memory: Tree
    loss: Array
    aux: Aux
    grads: Tree
    updates: Tree


def player(task: Task, tx: optax.GradientTransformation, estimate: Estimate) -> Player:
    return Player(task, optax.with_extra_args_support(tx), estimate)


def axes_of(task: Task, abstract: Variables) -> Tree:
    return replicated(abstract) if task.axes is None else task.axes


def watched(watch: Mapping[str, str], params: Tree) -> dict[str, list[int]]:
    """{group: which leaves of params, by number}. Raises ValueError (one line) for a pattern that is no regular expression or
    matches no path."""
    paths = [joined(path) for path, _ in leaves_with_paths(params)]
    groups = {}
    for name, pattern in watch.items():
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"watch[{name!r}]: {pattern!r} is no regular expression: {error}") from None
        groups[name] = [i for i, path in enumerate(paths) if compiled.search(path)]
        if not groups[name]:
            raise ValueError(f"watch[{name!r}]: {pattern!r} is found in no path of params; they are {', '.join(paths[:8])}")
    return groups


def group_metrics(groups: Mapping[str, list[int]], params: Tree, moved: Moved) -> Metrics:
    """ "grad_norm/<group>", and "update_ratio/<group>": the norm of the update over that of the weights before it, not counted
    where the weights are all 0."""
    weights, grads, updates = (jax.tree.leaves(t) for t in (params, moved.grads, moved.updates))
    out = {}
    for name, chosen in groups.items():
        gradient, update, weight = (norm([leaves[i] for i in chosen]) for leaves in (grads, updates, weights))
        counts = (weight != 0).astype(weight.dtype)
        out[f"grad_norm/{name}"] = (gradient, jnp.ones_like(gradient))
        out[f"update_ratio/{name}"] = (counts * update / jnp.where(weight == 0, 1, weight), counts)
    return out
