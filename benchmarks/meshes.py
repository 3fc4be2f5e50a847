"""One config on many meshes of eight simulated devices: how near its losses come to one device's, what a device holds.

Static counts from the compiled step, no times: bytes of parameters and optimizer on one device from their shardings, bytes of
temporaries from `memory_analysis`, collectives from the optimized HLO. A collective-permute's or all-gather's bytes are what a
device has after it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)

import numpy as np

from benchmarks.harness import run
from research.core.collectives import collectives, totals
from research.core.config import load_config
from research.core.loop import compiled
from research.core.mesh import entered
from research.experiment import build

NEEDS_PEERS = False
CONFIG, STEPS = "configs/lm/stdlib.py:smoke", 20
SCANNED = {"model.scan_layers": "True"}

MESHES: Mapping[str, Mapping[str, str]] = {
    "data 8": {"mesh.data": "8"},
    "fsdp 8": {"mesh.fsdp": "8"},
    "data 2, fsdp 2, tensor 2": {"mesh.data": "2", "mesh.fsdp": "2", "mesh.tensor": "2"},
    "sequence 8": {"mesh.sequence": "8"},
    "pipeline 4, data 2": {"mesh.pipeline": "4", "mesh.data": "2", **SCANNED},
}


class FirstSteps(NamedTuple):
    """losses: float64 [STEPS]. text: the step's optimized HLO. temporaries: their bytes on one device. state: shapes and
    shardings of the State."""

    losses: np.ndarray
    text: str
    temporaries: int
    state: Any


@functools.cache
def first_steps(overrides: tuple[tuple[str, str], ...] = ()) -> FirstSteps:
    """The config's first steps, with overrides. A function of its arguments, so it is done once."""
    experiment = build(load_config(CONFIG, dict(overrides)), CONFIG)
    stage, layout = experiment.stages[0], experiment.mesh
    with entered(layout):
        program = compiled(stage.learner, layout)
        key = jax.random.key(1) if layout is None else jax.device_put(jax.random.key(1), layout.replicated)
        state = program.init(jax.random.key(0), None)
        drawn = stage.batches.open()
        losses, step = [], None
        for _ in range(STEPS):
            batch = program.put(jax.tree.map(lambda x: x[None], next(drawn)))
            step = step or program.step.lower(state, batch, 1, key).compile()
            state, metrics = step(state, batch, key)
            total, weight = metrics["loss"]
            losses.append(float(total[0] / weight[0]))
    assert step is not None
    return FirstSteps(np.array(losses), step.as_text(), step.memory_analysis().temp_size_in_bytes, program.abstract)


def on(mesh: str) -> FirstSteps:
    return first_steps(tuple(MESHES[mesh].items()))


def alone(mesh: str) -> FirstSteps:
    """What `on(mesh)` is to equal: the same without the mesh."""
    return first_steps(tuple((key, value) for key, value in MESHES[mesh].items() if not key.startswith("mesh.")))


class Bytes(NamedTuple):
    on_a_device: int
    whole: int


def held(state: Any, group: str) -> Bytes:
    """Of a group of a State, such as "params"."""
    leaves = jax.tree.leaves(state[group])
    local = [x.shape if x.sharding is None else x.sharding.shard_shape(x.shape) for x in leaves]
    own = sum(int(np.prod(shape, dtype=int)) * x.dtype.itemsize for shape, x in zip(local, leaves, strict=True))
    return Bytes(own, sum(x.size * x.dtype.itemsize for x in leaves))


def facts(steps: FirstSteps, losses: np.ndarray) -> dict[str, Any]:
    groups = {"parameters": "params", "optimizer": "opt"}
    out: dict[str, Any] = {f"{name}, bytes a device": held(steps.state, group).on_a_device for name, group in groups.items()}
    out["temporaries, bytes a device"] = steps.temporaries
    for kind, total in totals(collectives(steps.text)).items():
        out[kind] = f"{total.runs} a step, {total.bytes} bytes"
    out["losses, largest relative difference"] = f"{np.abs(steps.losses / losses - 1).max():.1e}"
    return out


def main() -> list[dict[str, Any]]:
    one = first_steps()
    rows = {"one device": facts(one, one.losses)}
    for mesh in MESHES:
        print(mesh, flush=True)
        rows[mesh] = facts(on(mesh), alone(mesh).losses)
    return [{"work": f"{CONFIG}, {STEPS} steps", "facts": rows}]


if __name__ == "__main__":
    run(main)
