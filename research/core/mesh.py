"""Logical axis names to mesh axes. The only module that knows a mesh axis by name.

A `Layout` is a mesh and the table `{logical name: mesh axes}`. Where an array's named dimension is laid over mesh axes it must
divide by their sizes; what cannot work is refused in one line before anything compiles.

`entered(layout)` makes it the one in use. Within, activations are laid out by `constrained`, and a layer whose algorithm is a
collective asks `axes_of` a logical name which mesh axes it is to talk over.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from research.core.names import suggestion
from research.core.tree import Path, joined, map_with_path

# Outermost first: neighbors on the last axis are neighbors in the machine, where talk is most and dearest.
AXES = ("population", "pipeline", "data", "fsdp", "sequence", "tensor")
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": ("sequence",),
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "vocab": ("tensor",),
    "layers": ("pipeline",),
    "matrices": ("pipeline", "fsdp", "tensor"),
    "population": ("population",),
    "particles": ("data", "fsdp"),
}


class Pipeline(NamedTuple):
    """How layers that the mesh axes of "layers" cut into stages run one behind another; research/nn/pipeline.py does it.

    schedule: a name in its SCHEDULES. microbatches: into how many a batch is cut. groups: of layers a device. remat: keep only
    the inputs of stages for the backward pass.
    """

    schedule: str = "gpipe"
    microbatches: int = 4
    groups: int = 1
    remat: bool = True


class Layout(NamedTuple):
    """A mesh, which of its axes each logical name is laid over, and how layers run that are laid over some."""

    mesh: Mesh
    rules: Mapping[str, tuple[str, ...]]
    pipeline: Pipeline = Pipeline()

    def parts(self, name: str) -> int:
        """How many devices the logical `name` is laid over."""
        return math.prod(self.mesh.shape.get(a, 1) for a in self.rules.get(name, ()))

    def spec(self, axes: Sequence[str | None], shape: Sequence[int], what: str) -> PartitionSpec:
        """The PartitionSpec of an array called `what`. ValueError names the array, the dimension and the axis."""
        used: dict[str, int] = {}
        out: list[Any] = []
        for i, size in enumerate(shape):
            name = axes[i] if i < len(axes) else None
            over = tuple(a for a in self.rules.get(name, ()) if a in self.mesh.shape) if name else ()
            for a in over:
                if a in used:
                    raise ValueError(f"mesh axis {a!r} is used twice on {what} {tuple(shape)}: dimensions {used[a]} and {i}")
                used[a] = i
            parts = math.prod(self.mesh.shape[a] for a in over)
            if size % parts:
                raise ValueError(
                    f"{what} {tuple(shape)}: dimension {i} ({name}) of {size} is not divisible by mesh {'x'.join(over)}={parts}"
                )
            out.append(over if len(over) > 1 else over[0] if over else None)
        return PartitionSpec(*out)

    def shardings(self, axes: Any, abstract: Any, what: str) -> Any:
        """NamedShardings of a tree of arrays (or their shapes) whose axes are `axes`. Of those that cannot be laid out, the
        ValueError names one of the shortest path: a parameter, not its moments."""
        refused: list[tuple[int, str]] = []

        def of(path: Path, own: Any, x: Any) -> NamedSharding | None:
            try:
                return NamedSharding(self.mesh, self.spec(tuple(own), x.shape, f"{what} {joined(path)}"))
            except ValueError as error:
                refused.append((len(path), str(error)))
                return None

        made = map_with_path(of, axes, abstract)
        if refused:
            raise ValueError(min(refused)[1])
        return made

    def batch_shardings(self, specs: Any) -> Any:
        return map_with_path(
            lambda path, s: NamedSharding(self.mesh, self.spec(s.axes, s.shape, f"batch {joined(path)}")), specs
        )

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())


def make_layout(
    sizes: Mapping[str, int], rules: Mapping[str, Sequence[str]] = RULES, pipeline: Pipeline = Pipeline()
) -> Layout | None:
    """A Layout over the first prod(sizes) devices; one size may be -1 (all that are left). Its mesh has the axes whose size is
    above 1; None where there are none.

    Raises ValueError on an unknown axis, or sizes that the devices at hand cannot make up.
    """
    for axis in sizes:
        if axis not in AXES:
            raise ValueError(f"mesh.{axis}: no such mesh axis; allowed: {', '.join(AXES)}{suggestion(axis, AXES)}")
    for name, over in rules.items():
        for axis in over:
            if axis not in AXES:
                raise ValueError(
                    f"mesh rule {name!r}: no mesh axis {axis!r}; allowed: {', '.join(AXES)}{suggestion(axis, AXES)}"
                )
    sizes, devices = {axis: sizes[axis] for axis in AXES if axis in sizes}, jax.devices()
    open_axes = [a for a, n in sizes.items() if n == -1]
    known = math.prod(n for n in sizes.values() if n != -1)
    given = ", ".join(f"{axis}={n}" for axis, n in sizes.items() if n != 1)
    if len(open_axes) > 1 or any(n != -1 and n < 1 for n in sizes.values()):
        raise ValueError(f"mesh {given}; allowed: sizes are 1 or more, and at most one is -1")
    if known > len(devices) or (open_axes and len(devices) % known):
        most = f"{'a divisor of' if open_axes else 'at most'} {len(devices)} devices"
        raise ValueError(f"mesh {given}: the sizes given make up {known}; allowed: {most}, all that are here")
    if open_axes:
        sizes[open_axes[0]] = len(devices) // known
    # Axes of one device are left out: a shard_map over them would sum gradients over nobody, in a collective of its own.
    sizes = {axis: n for axis, n in sizes.items() if n > 1}
    total = math.prod(sizes.values())
    if not sizes:
        return None
    # Auto axes: under Explicit ones, the default of jax.make_mesh, embedding look-ups raise.
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices[:total])
    return Layout(mesh, {k: tuple(v) for k, v in rules.items()}, pipeline)


_IN_USE: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextlib.contextmanager
def entered(layout: Layout | None) -> Iterator[None]:
    """The one ambient context of the project: the layout is in use, and its mesh is `jax.set_mesh`'s, where there is one."""
    token = _IN_USE.set(layout)
    try:
        with contextlib.nullcontext() if layout is None else jax.set_mesh(layout.mesh):
            yield
    finally:
        _IN_USE.reset(token)


_TAKEN: ContextVar[tuple[str, ...]] = ContextVar("taken", default=())


@contextlib.contextmanager
def taken(axes: Sequence[str]) -> Iterator[None]:
    """Within, nothing is laid over these mesh axes: they are those of a dimension that a `jax.vmap` around hides."""
    token = _TAKEN.set((*_TAKEN.get(), *axes))
    try:
        yield
    finally:
        _TAKEN.reset(token)


def _free(layout: Layout) -> dict[str, int]:
    """The mesh axes that a layer may still talk or lay out over, with their sizes: within `jax.shard_map` not those it took,
    and not those that are `taken`."""
    used = (*jax.sharding.get_abstract_mesh().manual_axes, *_TAKEN.get())
    return {a: n for a, n in layout.mesh.shape.items() if a not in used}


def axes_of(name: str) -> tuple[str, ...]:
    """The mesh axes that the layout in use lays the logical `name` over, () if none; within a `jax.shard_map` not those that it
    took."""
    layout = _IN_USE.get()
    if layout is None:
        return ()
    free = _free(layout)
    return tuple(a for a in layout.rules.get(name, ()) if a in free)


def size_of(axes: Sequence[str]) -> int:
    """How many devices lie along these mesh axes of the layout in use."""
    layout = _IN_USE.get()
    return math.prod(layout.mesh.shape[a] for a in axes) if layout else 1


def pipeline_in_use() -> Pipeline:
    """How layers run that the layout in use lays over mesh axes."""
    layout = _IN_USE.get()
    return layout.pipeline if layout else Pipeline()


def spec_of(names: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """How the layout in use cuts an activation: of two dimensions that want one mesh axis the first has it, and one that does
    not divide is left whole. Both are matters of time and memory only."""
    used: set[str] = set()
    out: list[Any] = []
    for name, size in zip(names, shape, strict=True):
        over = tuple(a for a in (axes_of(name) if name else ()) if a not in used)
        over = over if size % size_of(over) == 0 else ()
        used |= set(over)
        out.append(over or None)
    return PartitionSpec(*out)


def constrained(x: jax.Array, *names: str | None) -> jax.Array:
    """`x`, laid out by the logical names of its dimensions as the layout in use says; `x` itself without one.

    Raises ValueError where there are not as many names as dimensions.
    """
    if len(names) != x.ndim:
        raise ValueError(f"constrained: {len(names)} axis names {names} for a shape {x.shape}")
    layout = _IN_USE.get()
    if layout is None or not _free(layout):
        return x
    return jax.lax.with_sharding_constraint(x, spec_of(names, x.shape))
