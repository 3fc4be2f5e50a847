"""Per-example clipping of gradients, with or without the noise of differential privacy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from research.core.merge import merged
from research.core.tree import leaves_with_paths
from research.core.types import Aux, Batch, Estimate, Example, Key, Task, Tree, Variables
from research.estimates._example import linear_regression
from research.estimates._weighted import counted, mean_of, microbatches, weight_of, weighted


def _rows(specs: Tree) -> int:
    """The size of the "batch" axis. Raises ValueError where no leaf has one."""
    for _, spec in leaves_with_paths(specs):
        if "batch" in spec.axes:
            return spec.shape[spec.axes.index("batch")]
    raise ValueError('clipped_per_example: no leaf of the batch has an axis named "batch"')


def _noise(key: Key, like: Tree) -> Tree:
    leaves, structure = jax.tree.flatten(like)
    drawn = [jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, drawn)


def clipped_per_example(clip: float, noise: float = 0.0, chunk: int | None = None) -> Estimate:
    """The mean over examples of g / max(1, |g| / clip), with g the gradient of one example's loss.

    Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1. An example is a batch of size 1 along the axis
    that the task's Specs name "batch"; examples are averaged by the `Aux.weight` of each. `noise` is their noise multiplier
    sigma: a normal of standard deviation sigma * clip * (largest weight) is added to the sum before it is divided by the sum of
    weights. The privacy that they prove needs equal weights; padding (weight 0) makes the divisor depend on the data.

    chunk: how many examples are differentiated at once (a divisor of the batch; None: all), which bounds memory at chunk times
    the params. metrics has, beside the task's, "clipped": the share of examples whose gradient was cut.

    Raises ValueError: clip not above 0, noise below 0; a batch not divisible by chunk; a loss without weight (Aux.weight None).
    """
    if not clip > 0 or not noise >= 0 or (chunk is not None and chunk < 1):
        raise ValueError(
            f"clipped_per_example: clip={clip}, noise={noise}, chunk={chunk}; "
            "allowed: clip above 0, noise 0 or more, chunk 1 or more"
        )
    who = "clipped_per_example"

    def init(task: Task, variables: Variables, key: Key) -> Tree:
        return {}

    def grads(memory: Tree, task: Task, variables: Variables, batch: Batch, key: Key):
        rows = _rows(task.batch)
        if rows % (chunk or rows):
            raise ValueError(f"{who}: the batch of {rows} is not divisible by chunk={chunk}")
        at_once = chunk or rows
        params, (key, noise_key) = variables["params"], jax.random.split(key)

        def of_one(example, key):
            def loss(params):
                return task.loss({**variables, "params": params}, example, key)

            (value, aux), g = jax.value_and_grad(loss, has_aux=True)(params)
            weight = weight_of(aux, who)
            g = counted(weight, jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), g))
            norm = optax.tree.norm(g)
            share = weighted(weight, jax.tree.map(lambda x: x / jnp.maximum(1, norm / clip), g))
            cut, seen = (norm > clip).astype(jnp.float32), (weight > 0).astype(jnp.float32)
            return share, (weighted(weight, value), aux._replace(metrics={**aux.metrics, "clipped": (cut, seen)}))

        def body(sums, part):
            shares, rest = jax.vmap(of_one)(*part)
            return jax.tree.map(lambda s, x: s + x.sum(0), sums, shares), rest

        examples = microbatches(batch, task.batch, rows, who)
        chunks = (rows // at_once, at_once)
        parts = jax.tree.map(lambda x: x.reshape(*chunks, *x.shape[1:]), (examples, jax.random.split(key, rows)))
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params)
        sums, rest = jax.lax.scan(body, zeros, parts)
        losses, each = jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), rest)
        total = each.weight.sum()
        if noise:
            scale = noise * clip * each.weight.max()
            sums = jax.tree.map(lambda s, z: s + (scale * z).astype(s.dtype), sums, _noise(noise_key, sums))
        state = merged(each.state, each.weight, variables["state"], task.merge)
        aux = Aux(state, jax.tree.map(lambda x: x.sum(0), each.metrics), total)
        return mean_of(losses.sum(), total, losses), aux, mean_of(sums, total, params), memory

    return Estimate(init, grads)


def example() -> Example:
    return Example(
        clipped_per_example(1.0, chunk=4),
        linear_regression(),
        exact_gradient=False,
        why="gradients of single examples are clipped",
    )
