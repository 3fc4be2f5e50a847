"""A config's first steps on a mesh, and the program that makes them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from research.core.config import load_config
from research.core.loop import compiled
from research.core.mesh import entered
from research.experiment import build

SMOKE = "configs/lm/stdlib.py:smoke"
SCANNED = {"model.scan_layers": "True"}

# Everything that one config runs on, as overrides of it.
MESHES: Mapping[str, Mapping[str, str]] = {
    "data 8": {"mesh.data": "8"},
    "fsdp 8": {"mesh.fsdp": "8"},
    "data 2, fsdp 2, tensor 2": {"mesh.data": "2", "mesh.fsdp": "2", "mesh.tensor": "2"},
    "sequence 8": {"mesh.sequence": "8"},
    "pipeline 4, data 2": {"mesh.pipeline": "4", "mesh.data": "2", **SCANNED},
}


class Trained(NamedTuple):
    """losses: float32 [steps]. text: the step's optimized HLO. memory: bytes of temporaries on one device. state: shapes and
    shardings of the State."""

    losses: np.ndarray
    text: str
    memory: int
    state: Any


@functools.cache
def trained(name: str | None, steps: int = 20, extra: tuple[tuple[str, str], ...] = ()) -> Trained:
    """The smoke config on MESHES[name], or on one device; a function of its arguments, so it is done once."""
    experiment = build(load_config(SMOKE, {**(MESHES[name] if name else {}), **dict(extra)}), SMOKE)
    stage, layout = experiment.stages[0], experiment.mesh
    with entered(layout):
        program = compiled(stage.learner, layout)
        key = jax.random.key(1) if layout is None else jax.device_put(jax.random.key(1), layout.replicated)
        state = program.init(jax.random.key(0), None)
        drawn = stage.batches.open()
        losses, step = [], None
        for _ in range(steps):
            batch = program.put(jax.tree.map(lambda x: x[None], next(drawn)))
            step = step or program.step.lower(state, batch, 1, key).compile()
            state, metrics = step(state, batch, key)
            total, weight = metrics["loss"]
            losses.append(float(total[0] / weight[0]))
    assert step is not None
    return Trained(np.array(losses), step.as_text(), step.memory_analysis().temp_size_in_bytes, program.abstract)
