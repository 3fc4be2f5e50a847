"""A linear classifier in closed form, fitted to each support."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from research.core.types import Array, Example, Key, Task, Variables
from research.transforms._example import small_classifier
from research.transforms._heads import head
from research.transforms._trees import axes_of


def ridge_head(
    task: Task,
    ways: int,
    *,
    method: str = "predict",
    support: int | None = None,
    regularization: float = 1.0,
    scale: float = 1.0,
) -> Task:
    """R2-D2 (Bertinetto et al. 2019, arXiv 1805.08136, section 3.2): ridge regression from the support's features X [S, F] to
    its one-hot classes Y [S, ways], W = X' (X X' + r I)^-1 Y, by Woodbury's identity an S x S system and no F x F one; the
    logits of a query with features x are a x W + b. The gradient is that of the closed form.

    Learned too, and shared by all episodes: log r, a and b, in params["ridge"] {"log_regularization", "scale", "bias"}, begun
    at `regularization`, `scale` and 0. params["task"] are the task's. A masked example of the support counts by its mask. All
    else as in `prototypical`.

    Raises ValueError as it does, and for a regularization that is not above 0 and finite.
    """
    if not 0 < regularization < math.inf:
        raise ValueError(f"ridge_head: regularization={regularization}; allowed: above 0, finite")

    def init(key: Key) -> Variables:
        variables = task.init(key)
        ridge = {"log_regularization": math.log(regularization), "scale": scale, "bias": 0.0}
        return {**variables, "params": {"task": variables["params"], "ridge": jax.tree.map(jnp.float32, ridge)}}

    def classify(variables: Variables, shown_SxF: Array, labels_SxK: Array, asked_QxF: Array) -> Array:
        ridge = variables["params"]["ridge"]
        # the mask is a weight of each square: both sides of its row times the root of it
        root_Sx1 = jnp.sqrt(labels_SxK.sum(1, keepdims=True))
        rows_SxF, wanted_SxK = root_Sx1 * shown_SxF, labels_SxK / jnp.where(root_Sx1 > 0, root_Sx1, 1)
        gram_SxS = rows_SxF @ rows_SxF.T + jnp.exp(ridge["log_regularization"]) * jnp.eye(len(rows_SxF), dtype=rows_SxF.dtype)
        dual_SxK = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(gram_SxS), wanted_SxK)
        return ridge["scale"] * (asked_QxF @ rows_SxF.T @ dual_SxK) + ridge["bias"]

    def inside(variables: Variables) -> Variables:
        return {**variables, "params": variables["params"]["task"]}

    axes = axes_of(task)
    own = {name: jax.P() for name in ("log_regularization", "scale", "bias")}
    made = head(task, ways, classify, inside, method=method, support=support, who="ridge_head")
    return made._replace(init=init, axes={**axes, "params": {"task": axes["params"], "ridge": own}})


def example() -> Example:
    return Example(ridge_head(small_classifier(batch=4), 3, support=6, regularization=0.5, scale=2.0))
