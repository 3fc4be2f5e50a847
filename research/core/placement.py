"""Host arrays onto a mesh that may span processes: each process makes and places its own part only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from research.core import processes
from research.core.mesh import Layout
from research.core.types import Batch, Batches, Spec, Tree


def placed(x: Any, sharding: Any, start: int = 0, axis: int = 0, size: int | None = None) -> jax.Array:
    """The host array `x` on a sharding that may span processes.

    Every process holds the whole of it, or, with `size`, what its own devices need: a part of dimension `axis` that begins at
    `start`, where the whole has `size`.
    """
    x = np.asarray(x)
    shape = list(x.shape)
    if size is not None:
        shape[axis] = size

    def part(index: Any) -> np.ndarray:
        begin, end, _ = index[axis].indices(shape[axis]) if shape else (0, 0, 1)
        own = (*index[:axis], slice(begin - start, end - start), *index[axis + 1 :]) if shape else ()
        return x[own]

    return jax.make_array_from_callback(tuple(shape), sharding, part)


def onto(tree: Tree, shardings: Tree) -> Tree:
    """A tree of host arrays, or arrays of this process, that all processes hold alike, onto shardings (or onto one)."""
    if processes.count() == 1:
        return jax.device_put(tree, shardings)
    shardings = jax.tree.map(lambda _: shardings, tree) if isinstance(shardings, jax.sharding.Sharding) else shardings
    return jax.tree.map(placed, tree, shardings)


def replicated(tree: Tree, layout: Layout | None) -> Tree:
    """The tree, leaves that lie elsewhere copied to every device of the mesh; those on it stay as they are laid out."""
    if layout is None:
        return tree
    devices = set(layout.mesh.devices.flat)

    def place(x: Any) -> jax.Array:
        here = isinstance(x, jax.Array) and x.sharding.device_set == devices
        return x if here else onto(x, layout.replicated)

    return jax.tree.map(place, tree)


def check_spanned(layout: Layout | None) -> None:
    """ValueError where there are several processes and the mesh leaves one without a device of its own."""
    used = {device.process_index for device in layout.mesh.devices.flat} if layout is not None else {0}
    if len(used) < processes.count():
        sizes = dict(layout.mesh.shape) if layout is not None else "of one device"
        raise ValueError(
            f"mesh {sizes}: lies on {len(used)} of {processes.count()} processes; "
            f"allowed: one that takes in all {jax.device_count()} devices, such as mesh.data=-1"
        )


def stacked(shardings: Tree) -> Tree:
    """Shardings of the same with a leading axis of steps."""
    return jax.tree.map(lambda s: NamedSharding(s.mesh, PartitionSpec(None, *s.spec)), shardings)


def settled(tree: Tree, layout: Layout | None) -> None:
    """Waits for these results of a program on a mesh of simulated devices, which share one pool of threads: programs that are
    begun before it has ended could leave its last device no thread to take part in a collective with, for good."""
    if layout is not None and jax.default_backend() == "cpu":
        jax.block_until_ready(tree)


def rows_here(shardings: Tree, specs: Tree) -> tuple[int, int] | None:
    """(start, stop) of the leading dimension, from the first row to the last that this process's devices need of any leaf; None
    where the leaves have not all one leading dimension."""
    pairs = list(zip(jax.tree.leaves(shardings), jax.tree.leaves(specs), strict=True))
    sizes = {spec.shape[0] if spec.shape else None for _, spec in pairs}
    if len(sizes) != 1 or None in sizes:
        return None
    taken = [
        index[0].indices(spec.shape[0])
        for sharding, spec in pairs
        for index in sharding.addressable_devices_indices_map(spec.shape).values()
    ]
    return min(begin for begin, _, _ in taken), max(end for _, end, _ in taken)


class Share(NamedTuple):
    """What a process draws. put: several of its batches, stacked, onto the devices, as a part of the whole."""

    batches: Batches
    specs: Tree
    put: Callable[[Batch], Batch]


def share_of(batches: Batches, specs: Tree, layout: Layout | None, put: Callable[[Batch], Batch]) -> Share:
    """The Share of this process in batches of `specs`; `put` takes those that it must make whole.

    Where the source can be cut by rows, only the rows that this process's devices need are made; else all, and its part taken.
    """
    if layout is None or processes.count() == 1:
        return Share(batches, specs, put)
    shardings = layout.batch_shardings(specs)
    rows = rows_here(shardings, specs)
    if rows is None or batches.rows is None:
        return Share(batches, specs, put)
    whole = stacked(shardings)
    start, stop = rows

    def put_part(batch: Batch) -> Batch:
        return jax.tree.map(lambda x, s, spec: placed(x, s, start, 1, spec.shape[0]), batch, whole, specs)

    own = jax.tree.map(lambda spec: Spec((stop - start, *spec.shape[1:]), spec.dtype, spec.axes), specs)
    return Share(batches.rows(start, stop), own, put_part)
