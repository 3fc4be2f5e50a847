"""What is written for one member, lifted over a population."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.core.types import Evaluator, Example, Key, Tree, Variables
from research.estimates._example import linear_regression
from research.learners.gradient import gradient
from research.learners.population import lanes, population

Enter = Callable[[Variables | None, Key], Variables]


@overload
def members(f: Evaluator, n: int, frozen: str = "shared", leaves: str | None = None) -> Evaluator: ...
@overload
def members(f: Enter, n: int, frozen: str = "shared", leaves: str | None = None) -> Enter: ...
def members(f, n, frozen="shared", leaves=None):
    """An evaluator, or the `enter` of a stage, over the stacked variables of a population of `n`.

    Evaluator: every member is measured on the same batches with the same keys; each value becomes an array [n, …].
    enter: each member is entered with its own key, from its own variables, or from None where no stage came before.

    frozen: "shared" or "own", as in the population whose variables come in. leaves (enter only): the same of what goes out, if
    it differs; where an enter puts something of a member's params into frozen, that is "own".

    Raises ValueError for an unknown choice.
    """
    if isinstance(f, Evaluator):
        return _evaluator(f, n, lanes(frozen))
    return _enter(f, n, lanes(frozen), lanes(frozen if leaves is None else leaves))


def _evaluator(evaluator: Evaluator, n: int, groups: Mapping[str, int | None]) -> Evaluator:
    def init() -> Tree:
        return jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(x), (n, *jnp.shape(x))), evaluator.init())

    def finalize(stats: Tree) -> Mapping[str, Any]:
        each = [evaluator.finalize(jax.tree.map(lambda x, i=i: np.asarray(x)[i], stats)) for i in range(n)]
        return {name: np.stack([np.asarray(values[name]) for values in each]) for name in each[0]}

    return Evaluator(init, jax.vmap(evaluator.update, (0, groups, None, None), axis_size=n), finalize)


def _enter(enter: Enter, n: int, groups: Mapping[str, int | None], out: Mapping[str, int | None]) -> Enter:
    def entered(variables: Variables | None, key: Key) -> Variables:
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n))
        if variables is None:
            return jax.vmap(lambda k: enter(None, k), out_axes=out)(keys)
        return jax.vmap(enter, (groups, 0), out)(variables, keys)

    return entered


def example() -> Example:
    """The mean squared prediction of each of three members."""
    task = linear_regression()
    predict = task.methods["predict"].apply

    def update(stats: Tree, variables: Variables, batch: Tree, key: Key) -> Tree:
        squares = predict(variables, batch, key) ** 2
        return {"sum": stats["sum"] + (squares * batch["mask"]).sum(), "weight": stats["weight"] + batch["mask"].sum()}

    one = Evaluator(
        lambda: {"sum": jnp.zeros(()), "weight": jnp.zeros(())},
        update,
        lambda stats: {"mean_square": float(stats["sum"] / stats["weight"])},
    )
    many = population(gradient(task, optax.sgd(0.1)), 3)
    return Example(members(one, 3), task._replace(init=lambda key: many.variables(many.init(key))))
