"""Sharpness-aware minimization: the gradient from the worst point nearby."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from research.core.types import Batch, Estimate, Example, Key, Task, Tree, Variables
from research.estimates._example import linear_regression
from research.estimates.exact import exact


def sharpness_aware(rho: float, inner: Estimate = exact()) -> Estimate:
    """The gradient of `inner` at params + rho * g / |g|, with g its gradient at params.

    Foret et al. 2021, "Sharpness-Aware Minimization for Efficiently Improving Generalization", eq. 2 (p = 2) for the point and
    eq. 3 for the gradient, which leaves out the second-order terms. Loss, Aux and the memory of `inner` are those of the first
    pass, at params themselves; both passes are given the same memory and key, so that they differ in the point alone. Twice the
    cost of `inner`. Where the gradient is 0 the point is params.

    Raises ValueError where rho is negative.
    """
    if not rho >= 0:
        raise ValueError(f"sharpness_aware: rho={rho}; allowed: 0 or more")

    def grads(memory: Tree, task: Task, variables: Variables, batch: Batch, key: Key):
        loss, aux, gradients, after = inner.grads(memory, task, variables, batch, key)
        norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), gradients))
        scale = rho / jnp.where(norm > 0, norm, 1)
        worst = jax.tree.map(lambda p, g: p + (scale * g).astype(p.dtype), variables["params"], gradients)
        _, _, gradients, _ = inner.grads(memory, task, {**variables, "params": worst}, batch, key)
        return loss, aux, gradients, after

    return Estimate(inner.init, grads, inner.axes)


def example() -> Example:
    return Example(
        sharpness_aware(0.05), linear_regression(), exact_gradient=False, why="it is the gradient at a perturbed point"
    )
