"""Steps that nobody looks at in between."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from benchmarks.goodput import MODEL
from research.core.batches import from_function
from research.core.loop import fit
from research.core.mesh import make_layout
from research.learners import gradient
from research.models import transformer
from research.tasks import language_model

STEPS = 200
WIDE = {"width": 64, "heads": 4, "kv_heads": 4, "head_dim": 16, "mlp_width": 64, "layers": 2, "vocab": 64, "context": 32}


def batch(i):
    tokens = np.random.default_rng(i).integers(0, 64, (8, 33)).astype(np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": np.ones((8, 32), np.float32)}


@pytest.mark.slow
def test_eight_simulated_devices_take_many_steps_between_two_looks():
    """Where all are begun at once, some step waits for its last device for ever, and XLA ends the process after a minute."""
    task = language_model(transformer(**MODEL | WIDE), batch=8, length=32, label_smoothing=0.0, z_loss=0.0)
    learner, mesh = gradient(task, optax.adam(1e-3)), make_layout({"fsdp": 8})
    state = fit(learner, from_function(batch, fingerprint="b"), STEPS, key=jax.random.key(0), log_every=STEPS, mesh=mesh)
    assert int(state["step"]) == STEPS
