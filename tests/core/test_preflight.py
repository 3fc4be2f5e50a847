"""What is told before a run touches its folder."""

from __future__ import annotations

import numpy as np
import pytest

from research.core.batches import from_function
from research.core.checkpoint import Checkpoints
from research.core.loop import run
from research.core.preflight import check
from research.core.types import Stage
from tests.core import toy

OPTIONS = {"steps_per_call": 1, "log_every": 2, "mesh": None}


def stage(batches=None, steps=4):
    return Stage(toy.learner(), toy.batches() if batches is None else batches, steps)


def test_stages_that_fit_are_let_through(tmp_path):
    check([stage(), stage()], {}, checkpoints=Checkpoints(tmp_path / "none"), **OPTIONS)
    assert not (tmp_path / "none").exists()


def test_a_first_batch_unlike_its_specs_is_refused(tmp_path):
    wrong = from_function(lambda i: {**toy.batch(i), "targets": np.zeros(5, np.float32)})
    with pytest.raises(ValueError, match="targets"):
        check([stage(), stage(wrong)], {}, checkpoints=Checkpoints(tmp_path), **OPTIONS)


def test_a_checkpoint_that_the_stages_cannot_go_on_from_is_refused_with_what_has_changed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    run([stage(), stage()], key=toy.KEY, checkpoints=checkpoints)
    checkpoints.close()
    check([stage(), stage()], {}, checkpoints=checkpoints, changed=["seed: was 0, given 1"], **OPTIONS)
    with pytest.raises(ValueError, match="the run has 1 stages; the config differs in stages: was 2, given 1"):
        check([stage()], {}, checkpoints=checkpoints, changed=["stages: was 2, given 1"], **OPTIONS)
    other = from_function(toy.batch, None, "other")
    with pytest.raises(ValueError, match="its batches were toy, now they are other; the config differs in data"):
        check([stage(), stage(other)], {}, checkpoints=checkpoints, changed=["data: was 1, given 2"], **OPTIONS)
