"""A State that is larger than a process's memory is made, trained and saved in parts."""

from __future__ import annotations

import jax
import pytest

from research.core.checkpoint import Checkpoints
from research.core.config import load_config
from research.experiment import build
from tests.faults.launching import Launched

pytestmark = [pytest.mark.alone, pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(900)]
CONFIG, LIMIT = "tests/faults/large_run.py", 1200  # MiB


def test_four_processes_train_what_does_not_fit_one(tmp_path):
    stage = build(load_config(CONFIG), CONFIG).stages[0]
    state = jax.eval_shape(stage.learner.init, jax.random.key(0))
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) > 1.05 * LIMIT * 2**20
    limit = f"--config.mebibytes={LIMIT}"
    code, said = Launched(tmp_path / "alone", 1, limit, config=CONFIG).ended()
    assert code and "Out of memory" in said, said
    run = Launched(tmp_path / "four", 4, limit, config=CONFIG)
    _, said = run.ended(600)  # the hash that the summary ends with gathers one array after another: it may not fit
    assert "step 1/1" in said, said
    checkpoints = Checkpoints(run.workdir / "checkpoints", read_only=True)
    saved = checkpoints.latest()
    assert saved.step == 1 and sum(p.stat().st_size for p in saved.path.rglob("*")) > LIMIT * 2**20
