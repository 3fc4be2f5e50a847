"""How noisy a gradient is, measured while it is taken."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from research.core.types import Array, Batch, Estimate, Example, Key, Task, Tree, Variables
from research.estimates._example import linear_regression
from research.estimates._weighted import weight_of
from research.estimates.accumulated import accumulated
from research.estimates.exact import exact

NAME = "noise_scale"


def noise_scale(n: int, inner: Estimate = exact()) -> Estimate:
    """`accumulated(n, inner)` that also measures the gradient noise scale B = tr(S) / |G|^2, the batch beyond which a larger
    one saves few steps (McCandlish et al. 2018, arXiv 1812.06162, equation 2.9 and appendix A.1).

    From the gradients g_i of n microbatches of weights w_i, and g of all, of weight W:
        tr(S) = (sum_i w_i |g_i|^2 - W |g|^2) / (n - 1),    |G|^2 = |g|^2 - tr(S) / W
    which are unbiased where examples are independent. The metric "noise_scale" is (tr(S), |G|^2), so that what is logged over
    many steps is the ratio of the means, as appendix A.1 wants it; it is in units of `Aux.weight`: examples, or tokens. Of one
    step alone it is mostly chance, and negative where |G|^2 is smaller than its error.

    Raises ValueError: n below 2, and what `accumulated` does.
    """
    if n < 2:
        raise ValueError(f"noise_scale: n={n}; allowed: 2 or more microbatches to compare")

    def measured(memory: Tree, task: Task, variables: Variables, batch: Batch, key: Key):
        loss, aux, gradients, memory = inner.grads(memory, task, variables, batch, key)
        weight = weight_of(aux, NAME)
        there = (weight > 0).astype(jnp.float32)
        own = jnp.where(weight > 0, weight * _square(gradients), 0), there
        return loss, aux._replace(metrics={**aux.metrics, NAME: own}), gradients, memory

    around = accumulated(n, inner._replace(grads=measured))

    def grads(memory: Tree, task: Task, variables: Variables, batch: Batch, key: Key):
        loss, aux, gradients, memory = around.grads(memory, task, variables, batch, key)
        squares, count = aux.metrics[NAME]
        whole = _square(gradients)
        enough = (count > 1).astype(whole.dtype)
        noise = enough * (squares - aux.weight * whole) / jnp.maximum(count - 1, 1)
        signal = enough * (whole - noise / jnp.where(aux.weight == 0, 1, aux.weight))
        return loss, aux._replace(metrics={**aux.metrics, NAME: (noise, signal)}), gradients, memory

    return Estimate(around.init, grads, around.axes)


def _square(gradients: Tree) -> Array:
    return jnp.asarray(sum((x.astype(jnp.promote_types(x.dtype, jnp.float32)) ** 2).sum() for x in jax.tree.leaves(gradients)))


def example() -> Example:
    return Example(noise_scale(4), linear_regression())
