"""Gradients summed over microbatches, so that memory is that of one of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from research.core.merge import merged
from research.core.mesh import axes_of, size_of
from research.core.types import Aux, Batch, Estimate, Example, Key, Task, Tree, Variables
from research.estimates._example import linear_regression
from research.estimates._weighted import mean_of, microbatches, weight_of, weighted
from research.estimates.exact import exact


def accumulated(n: int, inner: Estimate = exact()) -> Estimate:
    """`inner` on n microbatches in turn: their losses and gradients averaged by `Aux.weight`, which is that of the whole batch.

    Every microbatch starts from the same state; the n new ones are merged by `Task.merge`, metrics are summed, and the memory
    of `inner` goes from one to the next. Microbatches are cut by stride along the axis that the task's Specs name "batch";
    leaves without one go whole to each. Sums are float32 or wider. A microbatch of weight 0 counts nothing, whatever its loss.

    Raises ValueError: n below 1; a batch not divisible by n; a loss that is no weighted mean (Aux.weight None); under a mesh, a
    microbatch that is not divisible by the size of its batch axes, so that some devices would have nothing to do.
    """
    if n < 1:
        raise ValueError(f"accumulated: n={n}; allowed: 1 or more")

    def grads(memory: Tree, task: Task, variables: Variables, batch: Batch, key: Key):
        parts = microbatches(batch, task.batch, n, "accumulated")
        _check_laid_out(parts, task.batch, n)
        params = variables["params"]

        def body(carry, part):
            memory, sums = carry
            loss, aux, gradients, memory = inner.grads(memory, task, variables, *part)
            weight = weight_of(aux, "accumulated")
            sums = jax.tree.map(jnp.add, sums, weighted(weight, gradients))
            return (memory, sums), (weighted(weight, loss), aux.state, aux.metrics, weight)

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params)
        (memory, sums), (losses, states, metrics, weights) = jax.lax.scan(
            body, (memory, zeros), (parts, jax.random.split(key, n))
        )
        total = weights.sum()
        state = merged(states, weights, variables["state"], task.merge)
        aux = Aux(state, jax.tree.map(lambda x: x.sum(0), metrics), total)
        return mean_of(losses.sum(), total, losses), aux, mean_of(sums, total, params), memory

    return Estimate(inner.init, grads, inner.axes)


def _check_laid_out(parts: Batch, specs: Tree, n: int) -> None:
    """ValueError where the mesh in use lays out the whole batch evenly, but not a microbatch."""
    axes = axes_of("batch")
    for spec, x in zip(jax.tree.leaves(specs), jax.tree.leaves(parts), strict=True):
        rows = x.shape[1 + spec.axes.index("batch")] if "batch" in spec.axes else 0
        if rows * n % size_of(axes) == 0 and rows % size_of(axes):
            raise ValueError(
                f"accumulated: n={n} (estimate.accumulated.n) makes microbatches of {rows}, which mesh "
                f"{'x'.join(axes)}={size_of(axes)} does not divide; allowed: divisors of {rows * n // size_of(axes)}"
            )


def example() -> Example:
    return Example(accumulated(4), linear_regression())
