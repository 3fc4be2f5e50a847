"""What a run would take, from shapes alone: parameters, bytes of the State, FLOPs a step."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import jax

from research import cli
from research.core.contracts import check_learner
from research.core.flops import step_flops
from research.core.loop import compiled
from research.core.mesh import Layout
from research.core.tree import joined, leaves_with_paths
from research.core.types import Learner
from research.experiment import Experiment, Table
from research.nn.pipeline import bubble_share


def described(experiment: Experiment) -> str:
    """A table of parameters a stage, and the sums. Checks the learner and the mesh as a run would; compiles nothing."""
    stages = [text for i, s in enumerate(experiment.stages) for text in _stage(i, s.learner, s.steps, experiment.mesh)]
    return "\n".join([*stages, *pipeline_lines(experiment.mesh)])


def pipeline_lines(layout: Layout | None) -> list[str]:
    """How much of a step each device waits, where layers are a pipeline; [] where they are none."""
    stages = layout.parts("layers") if layout else 1
    if layout is None or stages == 1:
        return []
    schedule, microbatches, groups, _ = layout.pipeline
    idle = bubble_share(schedule, stages, microbatches, groups)
    of = f"{stages} stages, {microbatches} microbatches" + (f", {groups} groups of layers a device" if groups > 1 else "")
    return [f"pipeline ({schedule}): {of}; a device waits {idle:.1%} of a pass through the layers"]


def _stage(index: int, learner: Learner, steps: int, layout: Layout | None) -> Iterator[str]:
    check_learner(learner)
    state = compiled(learner, layout).abstract
    leaves = leaves_with_paths(learner_variables(learner)["params"])
    rows = [(joined(path), x.dtype, "x".join(map(str, x.shape)) or "scalar", f"{prod(x.shape):,}") for path, x in leaves]
    yield cli.table(Table(f"Stage {index}: parameters", ("path", "dtype", "shape", "count"), rows))
    by_group = {name: sum(map(_bytes, jax.tree.leaves(tree))) for name, tree in state.items()}
    sizes = [(name, _mib(size)) for name, size in by_group.items() if size]
    yield cli.table(Table(f"Stage {index}: the State", ("group", "size"), [*sizes, ("all", _mib(sum(by_group.values())))]))
    count = sum(prod(x.shape) for _, x in leaves)
    yield f"\n{count:,} parameters; {step_flops(learner):,} FLOPs a step (matrix products, from the jaxpr); {steps:,} steps"


def learner_variables(learner: Learner) -> Any:
    return jax.eval_shape(lambda key: learner.variables(learner.init(key)), jax.random.key(0))


def _bytes(x: Any) -> int:
    return prod(x.shape) * x.dtype.itemsize


def _mib(size: int) -> str:
    return f"{size / 2**20:,.2f} MiB"
