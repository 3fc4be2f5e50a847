"""Parameters are made where they will lie: no device holds the whole model while it begins."""

from __future__ import annotations

import jax
import optax
import pytest

from benchmarks.meshes import held
from research.core.loop import compiled
from research.core.mesh import entered, make_layout
from research.learners import gradient
from research.models import transformer
from research.tasks import language_model
from tests.models.test_on_a_mesh import DENSE, MODEL

WIDE = {
    "width": 512, "mlp_width": 2048, "layers": 4, "vocab": 256, "scan_layers": True, "ngrams": [], "induction": [],
    "copy": False, "conv": 0, "attention": DENSE,
}  # fmt: skip


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}])
def test_a_device_makes_its_own_part_alone(sizes):
    task = language_model(transformer(**MODEL | WIDE), batch=8, length=64, label_smoothing=0.0, z_loss=0.0)
    learner, layout = gradient(task, optax.adam(1e-3)), make_layout(sizes)
    with entered(layout):
        program = compiled(learner, layout)
        memory = program.init.lower(jax.random.key(0), None).compile().memory_analysis()
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.abstract))
    assert held(program.abstract, "params").whole > 32 * 2**20
    assert memory.output_size_in_bytes < 1.02 * whole / 8
    # beside what it keeps, numbers on their way: fewer than it keeps
    assert memory.temp_size_in_bytes < whole / 8
