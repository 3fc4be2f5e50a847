"""Every config that comes with the project is built, and steps, by shapes; a new config is covered without a line here.

Published data that is not on every machine is replaced by arrays of its form.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from research.core import contracts
from research.core.config import arguments, find, known_configs, load_config, load_module
from research.experiment import build


def with_args():
    """Every config with every arg it takes; by default "smoke" alone."""
    for name in known_configs():
        for arg in ("", *arguments(load_module(find(name)))):
            yield pytest.param(f"{name}:{arg}" if arg else name, marks=() if arg == "smoke" else pytest.mark.slow)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """{data.name: the section to put in its place}. A config with a build of its own finds Fashion-MNIST's arrays changed."""
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    labels = np.arange(5200) % 10
    for part in ("train", "test"):
        np.savez(folder / f"{part}.npz", x=draw.integers(0, 255, (5200, 28, 28), np.uint8), y=labels)
    text = folder / "text.md"
    text.write_text("All that is gold does not glitter; not all that glitters is gold.\n" * 2000)
    images = {
        "name": "npz_images",
        "train": f"{folder}/train.npz",
        "test": f"{folder}/test.npz",
        "image_name": "x",
        "label_name": "y",
    }
    parts = {"train": 12_000, "test": 1_000}
    drawn = {part: (draw.integers(0, 255, (n, 28, 28, 1), np.uint8), np.arange(n) % 10) for part, n in parts.items()}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("research.data.fashion_mnist.fashion_mnist", lambda *_: drawn)
        yield {
            "fashion_mnist": lambda section: images,
            "files": lambda section: {**section, "paths": [str(text)]},
            "glyphs": lambda section: {"name": "letters"},
        }


def built(name, stand_ins):
    plain = load_config(name).to_dict()
    if plain.get("data", {}).get("name") in stand_ins:
        plain["data"] = stand_ins[plain["data"]["name"]](plain["data"])
    return build(ConfigDict(plain), name)


@pytest.mark.parametrize("name", known_configs())
def test_every_config_takes_smoke_and_says_what_it_is(name):
    module = load_module(find(name))
    assert "smoke" in arguments(module)
    assert module.__doc__ and "gnomon" in module.__doc__, "its docstring shows the command"


@pytest.mark.parametrize("name", list(with_args()))
def test_it_builds_and_steps_by_shapes(name, stand_ins):
    experiment = built(name, stand_ins)
    key = contracts.abstract_key()
    variables = None
    for stage in experiment.stages:
        contracts.check_learner(stage.learner)
        batch = next(stage.batches.open())
        contracts.check_batch(batch, stage.learner.batch, stage.batches.fingerprint)
        assert stage.steps > 0
        if stage.enter is not None:
            variables = jax.eval_shape(stage.enter, variables, key)
            contracts.check_variables(variables, jax.eval_shape(lambda k, s=stage: s.learner.variables(s.learner.init(k)), key))
        variables = jax.eval_shape(lambda k, s=stage: s.learner.variables(s.learner.init(k)), key)
    for evaluation in experiment.evaluations.values():
        batch = jax.tree.map(np.asarray, next(evaluation.batches.open()))
        contracts.check_evaluator(evaluation.evaluator, variables, batch)
