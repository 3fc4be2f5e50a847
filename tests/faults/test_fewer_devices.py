"""A run of two processes goes on on one device, and that one's in two processes again."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from research.__main__ import main
from research.core.checkpoint import state_sha256
from research.core.hooks import read_series
from research.core.workdir import load_run
from tests.faults.launching import TOY, Launched

pytestmark = [pytest.mark.alone, pytest.mark.slow, pytest.mark.faults]
SHARDED = ("--config.mesh.data=1", "--config.mesh.fsdp=4")


def alone(workdir, steps: int) -> str:
    """Trains on one device; the hash of the State that this ends in."""
    words = [f"--config.steps={steps}", "--config.mesh.data=1", "--resume"]
    assert main(["train", "--config", TOY, "--workdir", str(workdir), *words]) == 0
    return json.loads((workdir / "summary.json").read_text())["state_sha256"]


def in_two(workdir, steps: int) -> str:
    """In two processes with two devices each."""
    run = Launched(workdir, 2, f"--config.steps={steps}", "--resume", *SHARDED, devices=2)
    return run.finished()["state_sha256"]


def test_what_one_trained_the_other_goes_on_with(tmp_path):
    run, straight = tmp_path / "run", tmp_path / "straight"
    held = in_two(run, 25)
    state = load_run(run).state
    assert state_sha256(state) == held and {len(x.sharding.device_set) for x in jax.tree.leaves(state)} == {1}
    held = alone(run, 40)
    (run / "summary.json").unlink()
    assert in_two(run, 40) == held  # nothing is left to train: it loads, and says what it has
    in_two(run, 63)

    alone(straight, 63)
    expected, found = (read_series(folder / "metrics.jsonl")["train/loss"] for folder in (straight, run))
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5)
    np.testing.assert_array_equal(load_run(run).variables["state"]["seen"], 7)
