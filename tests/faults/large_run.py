"""A transformer whose State is larger than the memory that each process allows itself, once its devices are there.

gnomon launch --processes 4 -- train --config tests/faults/large_run.py
"""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import optax
from ml_collections import ConfigDict

from benchmarks.goodput import MODEL
from research import Experiment
from research.core.batches import from_function
from research.core.mesh import make_layout
from research.core.types import Stage
from research.learners import gradient
from research.models import transformer
from research.tasks import language_model

BATCH, LENGTH = 4, 16
SIZE = {"width": 768, "layers": 16, "heads": 12, "kv_heads": 12, "head_dim": 64, "mlp_width": 3072, "context": LENGTH}


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict({"seed": 0, "steps": 1, "mebibytes": 0})  # that a process may take beside what it has, 0: all


def batch(i: int) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(i).integers(0, 256, (BATCH, LENGTH + 1)).astype(np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": np.ones((BATCH, LENGTH), np.float32)}


def taken() -> int:
    """Bytes of data that this process has mapped."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")]
    return 1024 * int(line.split()[1])


def build(config: ConfigDict) -> Experiment:
    mesh = make_layout({"fsdp": -1})
    if config.mebibytes:
        limit = taken() + config.mebibytes * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    task = language_model(transformer(**MODEL | SIZE), batch=BATCH, length=LENGTH, label_smoothing=0.0, z_loss=0.0)
    stage = Stage(gradient(task, optax.adam(1e-3)), from_function(batch, fingerprint="random tokens"), config.steps)
    return Experiment([stage], seed=config.seed, checkpoints={"every": 1}, replay=False, mesh=mesh)
