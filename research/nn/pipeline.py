"""Layers cut into stages that lie on different devices, and microbatches that pass through them one behind another.

The logical axis "layers" of stacked parameters is laid over mesh axes (core.mesh): a device holds a contiguous part of them,
in their natural order, so a checkpoint knows nothing of the mesh. A batch is cut into m microbatches. In each tick every device
runs its layers on what it holds and hands the result to its neighbor, so that after p - 1 ticks all p devices are at work.

    gpipe        Huang et al. 2019, arXiv 1811.06965, section 2.2. Idle: (p - 1) / (m + p - 1) of a step.
    interleaved  Narayanan et al. 2021, arXiv 2104.04473, section 2.2. The layers are cut into v p parts, and device i runs the
                 parts i, i + p, ..., its v groups: a microbatch goes round v times, in ticks v times shorter. Idle:
                 (p - 1) / (v m + p - 1). Parameters are stored in natural order all the same, so every pass moves them to where
                 they are used, and their gradients back: v messages of a device's share / v, in each direction.

Both run all forward passes and then, since the backward pass is the derivative of the scan over ticks, all backward passes.
With `remat` a device keeps the inputs of its stage, m + p - 1 of them (v m + p - 1), and the inside of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from research.core.mesh import Pipeline, axes_of, pipeline_in_use, size_of
from research.core.names import choose
from research.core.types import Tree
from research.nn import checks

SCHEDULES: Mapping[str, str] = {"gpipe": "one group of layers a device", "interleaved": "several groups of layers a device"}


def check_schedule(pipeline: Pipeline, stages: int) -> None:
    """Raises ValueError, naming the config's key, for a schedule that cannot be run on so many stages."""
    schedule, microbatches, groups, remat = pipeline
    choose(SCHEDULES, schedule, "pipeline.schedule")
    checks.positive("pipeline.microbatches", microbatches)
    checks.positive("pipeline.groups", groups)
    if schedule == "gpipe" and groups != 1:
        raise ValueError(f"pipeline.groups={groups} with pipeline.schedule='gpipe'; allowed: 1, or the schedule 'interleaved'")
    if schedule == "interleaved":
        if groups == 1:
            raise ValueError("pipeline.groups=1 with pipeline.schedule='interleaved'; allowed: 2 or more, or 'gpipe'")
        checks.divisible("pipeline.microbatches", microbatches, "mesh.pipeline", stages)
        if not remat:
            raise ValueError(
                "pipeline.remat=False with pipeline.schedule='interleaved' would keep a copy of a group's parameters for every "
                "microbatch; allowed: True"
            )


def bubble_share(schedule: str, stages: int, microbatches: int, groups: int) -> float:
    """The share of a step's ticks in which a device has nothing to do: (p - 1) / (v m + p - 1), where "gpipe" has v = 1.

    Raises ValueError for a schedule that cannot be run.
    """
    check_schedule(Pipeline(schedule, microbatches, groups), stages)
    return (stages - 1) / (groups * microbatches + stages - 1)


class Turn(NamedTuple):
    """What a device works on: which of its groups of layers, which microbatch."""

    group: jax.Array
    microbatch: jax.Array


def turn(tick: jax.Array, stages: int, groups: int, microbatches: int) -> Turn:
    """The turn of a device, `tick` ticks after its first one: p microbatches go round v times, then the next p do.

    Before its first and after its last tick, what it computes is not used; it is then given a microbatch too, rather than
    zeros, at which a derivative may not be finite.
    """
    tick = jnp.clip(tick, 0, groups * microbatches - 1)
    if groups == 1:
        return Turn(jnp.zeros_like(tick), tick)
    wave, within = tick // (stages * groups), tick % (stages * groups)
    return Turn(within // stages, wave * stages + within % stages)


def leaving(stages: int, groups: int, microbatches: int) -> np.ndarray:
    """The ticks at the end of which the last device is done with microbatches 0, 1, ...: int [microbatches]."""
    k = np.arange(microbatches)
    first = k if groups == 1 else k // stages * stages * groups + k % stages  # when they enter
    return first + stages * groups - 1


def cut(x: jax.Array, n: int) -> jax.Array:
    """[batch, ...] -> [n, batch / n, ...], row r in microbatch r % n: one laid out over devices stays where it is."""
    return jnp.moveaxis(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 1, 0)


def joined(x: jax.Array) -> jax.Array:
    """The inverse of `cut`."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _check_rows(carry: Tree, pipeline: Pipeline) -> None:
    """Raises ValueError where the batch, the first axis of every leaf, cannot be cut into the microbatches."""
    sizes = {x.shape[0] if x.ndim else 0 for x in jax.tree.leaves(carry)}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"pipeline: what passes through the layers must begin with one batch axis; it has sizes {sorted(sizes)}"
        )
    (rows,), n, data = sizes, pipeline.microbatches, size_of(axes_of("batch"))
    if rows % n:
        raise ValueError(f"pipeline.microbatches={n} does not divide the batch of {rows}; allowed: its divisors")
    if rows % data == 0 and rows // n % data:
        raise ValueError(
            f"pipeline.microbatches={n} makes microbatches of {rows // n}, which mesh {'x'.join(axes_of('batch'))}={data} does "
            f"not divide; allowed: divisors of {rows // data}"
        )


def _spread(x: jax.Array, axes: tuple[str, ...], stages: int, groups: int) -> jax.Array:
    """[groups, ...] of the parts i groups, i groups + 1, ... on device i -> of the parts i, i + stages, ...

    In round r each device sends the one of its parts that makes all of them be received by different devices.
    """
    d = np.gcd(stages, groups)
    device = np.arange(stages)
    here = jax.lax.axis_index(axes)
    rounds, slots = [], np.zeros((groups, stages), int)  # slots[r, i]: where device i puts what it received in round r
    for r in range(groups):
        sent = (r + device * d // stages) % groups
        part = device * groups + sent
        slots[r, part % stages] = part // stages
        taken = jax.lax.dynamic_index_in_dim(x, jnp.asarray(sent)[here], keepdims=False)
        rounds.append(jax.lax.ppermute(taken, axes, list(zip(device.tolist(), (part % stages).tolist(), strict=True))))
    return jnp.stack(rounds)[jnp.asarray(np.argsort(slots, axis=0))[:, here]]


def pipelined(layers: Callable[[Tree, Tree, jax.Array], Tree], stacked: Tree, carry: Tree) -> Tree:
    """`layers(stacked, carry, ...)`, with the leading axis of `stacked` cut into stages over the mesh axes of "layers".

    layers: (part of stacked, carry of a microbatch, its number) -> carry; any part, such as [2:4], gives those layers.
    carry: every leaf [batch, ...]. How it is cut and scheduled is `core.mesh.pipeline_in_use()`.

    Raises ValueError, naming the config's key, where stages, groups or microbatches do not fit.
    """
    pipeline, axes = pipeline_in_use(), axes_of("layers")
    stages, n, groups = size_of(axes), pipeline.microbatches, pipeline.groups
    check_schedule(pipeline, stages)
    _check_rows(carry, pipeline)
    count = jax.tree.leaves(stacked)[0].shape[0]
    checks.divisible("model.layers: stacked layers", count, "mesh.pipeline x pipeline.groups", stages * groups)

    def stage(grouped, held, group, microbatch):
        part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, group, keepdims=False), grouped)
        return layers(part, held, microbatch)

    if pipeline.remat:
        stage = jax.checkpoint(stage, prevent_cse=False)

    def device(part, batches):
        i = jax.lax.axis_index(axes)
        part = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), part)
        if groups > 1:
            part = jax.tree.map(lambda x: _spread(x, axes, stages, groups), part)

        def tick(held, t):
            group, k = turn(t - i, stages, groups, n)
            enters = (i == 0) & (group == 0)
            held = jax.tree.map(lambda new, x: jnp.where(enters, new[k], x), batches, held)
            out = stage(part, held, group, k)
            ring = [(j, (j + 1) % stages) for j in range(stages)]
            return jax.tree.map(lambda x: jax.lax.ppermute(x, axes, ring), out), out

        _, outs = jax.lax.scan(tick, jax.tree.map(lambda x: x[0], batches), jnp.arange(groups * n + stages - 1))
        return jax.tree.map(lambda x: x[leaving(stages, groups, n)][None], outs)

    over, whole = PartitionSpec(axes), PartitionSpec()
    # check_vma: otherwise a loop within a layer that starts from zeros, which do not vary over devices, would be refused
    run = jax.shard_map(device, in_specs=(over, whole), out_specs=over, axis_names=set(axes), check_vma=False)
    outs = run(stacked, jax.tree.map(lambda x: cut(x, n), carry))
    return jax.tree.map(lambda x: joined(x[-1]), outs)
