"""A run goes on where it is given other machines: the State is bit for bit what was saved, however it is laid out."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from research.core.batches import from_function
from research.core.checkpoint import Checkpoints, state_sha256
from research.core.loop import compiled, fit
from research.core.mesh import entered, make_layout
from research.learners import gradient
from research.models import transformer
from research.tasks import language_model
from tests.models.test_on_a_mesh import DENSE, MODEL

pytestmark = [pytest.mark.alone, pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(900)]

SIZES = {
    "fsdp 8": {"fsdp": 8},
    "fsdp 4": {"fsdp": 4},
    "tensor 2": {"tensor": 2},
    "one device": {"data": 1},
    "pipeline 2, data 2": {"pipeline": 2, "data": 2},
}
# Each is given the run by the one before.
ORDER = ("fsdp 8", "fsdp 4", "one device", "tensor 2", "pipeline 2, data 2")
STEPS = 2


@pytest.fixture(scope="module")
def learner():
    options = {"scan_layers": True, "ngrams": [], "induction": [], "copy": False, "conv": 0, "layers": 4, "attention": DENSE}
    task = language_model(transformer(**MODEL | options), batch=8, length=136, label_smoothing=0.0, z_loss=0.0)
    return gradient(task, optax.adam(1e-2))


def batch(i):
    tokens = np.random.default_rng(i).integers(0, 8, (8, 137)).astype(np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": np.ones((8, 136), np.float32)}


def test_a_run_is_handed_from_mesh_to_mesh(learner, tmp_path):
    checkpoints, batches, seen = Checkpoints(tmp_path), from_function(batch, fingerprint="b"), []
    alone = fit(learner, batches, STEPS * len(ORDER), key=jax.random.key(0))
    for i, name in enumerate(ORDER):
        layout = make_layout(SIZES[name])
        state = None
        if i:
            saved = checkpoints.latest()
            with entered(layout):
                state = checkpoints.load(saved, compiled(learner, layout).abstract)
            assert state_sha256(state) == seen[-1], name
        state = fit(learner, batches, STEPS * (i + 1), key=jax.random.key(0), state=state, checkpoints=checkpoints, mesh=layout)
        assert int(state["step"]) == STEPS * (i + 1)
        seen.append(state_sha256(state))
    assert len(set(seen)) == len(ORDER)
    for path, x in jax.tree_util.tree_leaves_with_path(alone["params"]):
        y = state["params"]
        for key in path:
            y = y[key.key]
        np.testing.assert_allclose(np.asarray(y), np.asarray(x), rtol=1e-3, atol=2e-4, err_msg=str(path))
