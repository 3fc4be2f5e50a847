"""The mesh of a config, and what must fit together on it, told before anything compiles."""

from __future__ import annotations

from typing import Any

import jax

from research.core.mesh import Layout, Pipeline, make_layout
from research.core.names import call_checked
from research.core.types import Learner
from research.experiment.sections import arguments
from research.nn.pipeline import check_schedule


def layout_of(config: Any) -> Layout | None:
    """The Layout of `config.mesh`, `config.rules` and `config.pipeline`; None where the mesh is one device.

    Raises ValueError (one line) on an unknown axis or schedule, and on sizes that cannot work.
    """
    pipeline = call_checked(Pipeline, arguments(config.pipeline), "pipeline")
    layout = make_layout(arguments(config.mesh), arguments(config.rules), pipeline)
    check_schedule(pipeline, layout.parts("layers") if layout else 1)
    return layout


def check_fits(config: Any, layout: Layout | None, learner: Learner) -> None:
    """ValueError where microbatches, of `estimate.accumulated` or the pipeline, do not cut the batch into what the mesh can lay
    out, where the pipeline has nothing to cut, and where sequences to evaluate on do not divide."""
    if layout is None:
        return
    rows = next((s.shape[s.axes.index("batch")] for s in jax.tree.leaves(learner.batch) if "batch" in s.axes), 0)
    wrap = config.estimate.wrap if "wrap" in config.estimate else ()
    n = config.estimate.accumulated.n if "accumulated" in wrap else 1
    batch = f"stream.batch={rows}"
    _check_cut("estimate.accumulated.n", n, batch, rows, layout)
    if "length" in config.evaluate and config.evaluate.length % layout.parts("length"):
        where = f"mesh.{'x'.join(layout.rules['length'])}={layout.parts('length')}"
        raise ValueError(f"evaluate.length={config.evaluate.length} is not divisible by {where}")
    if layout.parts("layers") > 1:
        _check_stages(config, layout, learner)
        cut = "pipeline.microbatches", layout.pipeline.microbatches
        _check_cut(*cut, batch if n == 1 else f"{batch} / estimate.accumulated.n={n}", rows // n, layout)
        _check_cut(*cut, f"evaluate.batch={config.evaluate.batch}", config.evaluate.batch, layout)


def _check_cut(name: str, n: int, batch: str, rows: int, layout: Layout) -> None:
    """ValueError unless n parts of the rows are laid out evenly over the mesh axes of "batch"; names the nearest n that are."""
    data = layout.parts("batch")
    if rows % n == 0 and (rows // n % data == 0 or n == 1):
        return
    fitting = [k for k in range(1, rows + 1) if rows % (k * data) == 0]
    nearest = f"; nearest: {min(fitting, key=lambda k: abs(k - n))}" if fitting else ""
    over = f", over which the mesh lays them {data} ways" if data > 1 else ""
    raise ValueError(f"{name}={n} does not cut {batch} into equal microbatches{over}{nearest}")


def _check_stages(config: Any, layout: Layout, learner: Learner) -> None:
    """ValueError unless there are stacked layers, and as many in every group of every stage."""
    stages, groups = layout.parts("layers"), layout.pipeline.groups
    abstract = jax.eval_shape(learner.init, jax.random.key(0))
    is_names = {"is_leaf": lambda x: isinstance(x, jax.P)}
    names, shapes = jax.tree.leaves(learner.axes, **is_names), jax.tree.leaves(abstract)
    counts = {x.shape[tuple(a).index("layers")] for a, x in zip(names, shapes, strict=True) if "layers" in tuple(a)}
    where = f"mesh.{'x'.join(layout.rules['layers'])}={stages}"
    if not counts and "scan_layers" in config.model and not config.model.scan_layers:
        raise ValueError(f"{where} with model.scan_layers=False: layers written out have no stages; allowed: True")
    if not counts:
        raise ValueError(f"{where} has nothing to cut: model.name={config.model.name!r} has no stacked layers; allowed: 1")
    for count in counts:
        if count % (stages * groups):
            of = f"model.layers={config.model.layers}" if "layers" in config.model else "the model"
            raise ValueError(
                f"{of} is a stack of {count} (one for each time that the pattern of masks repeats), not divisible by {where} x "
                f"pipeline.groups={groups}"
            )
