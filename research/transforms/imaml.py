"""Learning where to start, by the derivative of where a long inner loop ends."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from research.core.names import choose
from research.core.types import Array, Aux, Batch, Example, Key, Task, Tree, Variables
from research.transforms._adapting import check_optimizer, check_steps, episodic
from research.transforms._example import small_classifier
from research.transforms._implicit import SOLVERS, as_minimum, check_solver
from research.transforms._inner_loop import always, begin, inner_loop


def imaml(
    task: Task,
    inner_tx: optax.GradientTransformation = optax.sgd(0.01),
    steps: int = 16,
    *,
    strength: float = 2.0,
    solver: str = "cg",
    iterations: int = 5,
    rate: float = 0.1,
    support: int | None = None,
) -> Task:
    """`maml` whose inner loop minimizes support loss + strength / 2 |p - start|^2, and whose gradient is that of its minimum by
    the start, (1 + H / strength)^-1 dquery (Rajeswaran et al. 2019, arXiv 1909.04630, equations 3 and 6): its memory does not
    grow with the steps, and it is as exact as the minimum is.

    solver: of that linear system: "cg", `iterations` of conjugate gradients; "neumann", as many terms of the Neumann series at
        `rate`. H is the Hessian of the support loss at the end, with the last inner step's key.

    All else as in `maml`. Raises ValueError (one line): steps or iterations below 1, an unknown solver, strength or rate not
    above 0.
    """
    check_optimizer("imaml", inner_tx)
    check_steps("imaml", steps)
    check_solver("imaml", iterations, rate)
    if not strength > 0:
        raise ValueError(f"imaml: strength={strength}; allowed: above 0")
    solve = choose(SOLVERS, solver, "imaml: solver")(iterations, rate)

    def adapt(variables: Variables, support: Batch, key: Key) -> tuple[Variables, Array]:
        params = variables["params"]

        def loss(moving: Tree, state: Tree, batch: Batch, key: Key) -> tuple[Array, Aux]:
            value, aux = task.loss({**variables, "params": moving, "state": state}, batch, key)
            squares = jax.tree.map(lambda p, q: ((p - q) ** 2).sum(), moving, params)
            return value + strength / 2 * jnp.asarray(sum(jax.tree.leaves(squares))), aux

        inner = begin(inner_tx, params, variables["state"])
        inner, losses = jax.lax.stop_gradient(inner_loop(loss, inner_tx, inner, always(support), key, range(steps)))
        last = jax.random.fold_in(key, steps - 1)

        def gradient(moving: Tree) -> Tree:
            return jax.grad(lambda p: loss(p, variables["state"], support, last)[0])(moving)

        found = as_minimum(gradient, inner.params, solve)
        return {**variables, "params": found, "state": inner.state}, losses

    return episodic(task, adapt, support, who="imaml")


def example() -> Example:
    why = "that of the inner minimum, from which three steps are far"
    return Example(imaml(small_classifier(batch=4), optax.sgd(0.1), steps=3), exact_gradient=False, why=why)
