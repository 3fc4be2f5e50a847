"""A config that names another run as its teacher is taught by what that run's learner gives as its variables."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from research import build, load_config, load_run
from research.__main__ import main

SOURCE = """
from configs.papers.mnist1d import config


def get_config(arg=""):
    made = config.get_config("smoke")
    made.learner = {learner!r}
    made.transforms = {transforms!r}
    return made
"""
ALONE = {"wrap": [], "watch": {}}


def written(path: Path, learner=ALONE, transforms=None) -> str:
    path.write_text(SOURCE.format(learner=learner, transforms=transforms or {"wrap": []}))
    return str(path)


def taught_by(tmp_path: Path, learner) -> str:
    """The config of a student whose teacher, trained by `learner`, is in tmp_path/teacher."""
    teacher = written(tmp_path / "teacher.py", learner)
    assert main(["train", "--config", teacher, "--workdir", str(tmp_path / "teacher")]) == 0
    distill = {"config": teacher, "workdir": str(tmp_path / "teacher"), "temperature": 2.0, "weight": 0.5}
    return written(tmp_path / "student.py", transforms={"wrap": ["distill"], "distill": distill})


def test_an_averaged_teacher_teaches_by_its_average(tmp_path):
    student = taught_by(tmp_path, {"wrap": ["average"], "average": {"decay": 0.9}, "watch": {}})
    stage = build(load_config(student), student).stages[0]
    averaged = build(load_config(str(tmp_path / "teacher.py"))).stages[0].learner
    wanted = load_run(tmp_path / "teacher", lambda stage: averaged).variables["params"]
    last = load_run(tmp_path / "teacher").variables["params"]
    frozen = jax.tree.leaves(stage.enter(None, jax.random.key(0))["frozen"])
    for leaf, raw in zip(jax.tree.leaves(wanted), jax.tree.leaves(last), strict=True):
        assert any(np.array_equal(leaf, one) for one in frozen) and not np.array_equal(leaf, raw)


def test_a_population_teaches_none(tmp_path):
    learner = {"wrap": ["population"], "population": {"n": 2, "method": "vmap"}, "watch": {}}
    student = taught_by(tmp_path, learner)
    with pytest.raises(ValueError, match="holds a population; allowed: a run of one model"):
        build(load_config(student), student)
