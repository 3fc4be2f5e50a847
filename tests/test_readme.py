"""The README's code does what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import pytest

from research import build, load_config
from research.__main__ import main
from research.core.contracts import check_learner

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block(part: str) -> str:
    """The one block that holds `part`."""
    (found,) = [code for code in BLOCKS if part in code]
    return found


@pytest.fixture
def ridge(tmp_path) -> str:
    """The Task, the transform and the config of their own, as one file."""
    file = tmp_path / "ridge.py"
    file.write_text("\n\n".join(block(f"def {name}(") for name in ("ridge", "noisy_inputs", "build")))
    return str(file)


def test_a_task_and_a_transform_of_ones_own_are_trained(ridge, tmp_path):
    assert main(["train", "--config", ridge, "--workdir", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert summary["steps"] == 200 and lines[-1]["train/loss"] < 0.2 * lines[0]["train/loss"]
    experiment = build(load_config(ridge), ridge)
    check_learner(experiment.stages[0].learner)


def test_a_config_of_ones_own_is_built(tmp_path):
    (tmp_path / "mine.py").write_text(block("stdlib.get_config"))
    learner = build(load_config(str(tmp_path / "mine.py"))).stages[0].learner
    assert "average" in learner.axes and len(jax.eval_shape(learner.init, jax.random.key(0))["params"]["blocks"]) == 6
