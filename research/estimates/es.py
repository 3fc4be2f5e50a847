"""Evolution strategies: a gradient from losses alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from research.core.types import Batch, Estimate, Example, Key, Task, Tree, Variables
from research.estimates._example import linear_regression
from research.estimates._particles import both_ways, check_spread, noise, slope
from research.estimates._weighted import counted


def es(sigma: float, pairs: int) -> Estimate:
    """The mean over antithetic pairs of (L(params + e) - L(params - e)) e / (2 sigma^2), with e ~ N(0, sigma^2).

    Salimans et al. 2017 (arXiv 1703.03864, section 2 and 2.1): the gradient of the loss smoothed by that normal, unbiased for
    it, of a task that need not be differentiable. All particles see the state, the batch and the key that the parameters see.
    Loss, Aux and state are those of one further evaluation, at the parameters themselves: 2 * pairs + 1 in all. Where
    Aux.weight is 0, loss and gradient are 0.

    With state that is an inner problem (`transforms.unroll`), `truncated(horizon, es(sigma, pairs))` is truncated ES: at each
    truncation all particles begin where the problem of the unperturbed parameters stands, so what a perturbation does beyond
    the truncation is not seen, and the estimate is biased as truncated backpropagation is. `pes` and `noise_reuse` see it.

    Raises ValueError: sigma not above 0, pairs below 1.
    """
    check_spread("es", sigma, pairs)

    def init(task: Task, variables: Variables, key: Key) -> Tree:
        return {}

    def grads(memory: Tree, task: Task, variables: Variables, batch: Batch, key: Key):
        k_loss, k_noise = jax.random.split(key)
        value, aux = task.loss(variables, batch, k_loss)
        moved = noise(sigma, k_noise, variables["params"], pairs)
        states = jax.tree.map(lambda x: jnp.broadcast_to(x, (pairs, 2, *x.shape)), variables["state"])
        losses, _ = both_ways(task, variables, batch, moved, states, jnp.broadcast_to(k_loss, (pairs,)))
        value, gradients = counted(aux.weight, (value, slope(losses, moved, sigma)))
        return value, aux, gradients, memory

    return Estimate(init, grads)


def example() -> Example:
    return Example(es(0.1, 6), linear_regression(), exact_gradient=False, why="it is estimated from random perturbations")
