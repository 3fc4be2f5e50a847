"""What a run has learned is an optimizer by its workdir: the theta of the newest checkpoint, or a refusal in one line."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import train
from research.core.checkpoint import Checkpoints
from research.core.storage import state_sha256
from research.core.workdir import Workdir
from research.optim import make
from research.optim.learned import learned_optimizer, restored

SECTION = {"name": "learned_scales", "version": 1, "base": "momentum", "learning_rate": 0.3}
PARAMS = {"w": jnp.arange(6.0).reshape(2, 3)}


def a_run(path, config, params=None):
    """The folder of a run of this config, with a checkpoint of these params if any."""
    with Workdir.create(path, config) as workdir:
        workdir.begin()
        workdir.metrics_path.write_text('{"stage": 0, "step": 0, "seconds": 0.0}\n')
        if params is not None:
            checkpoints = Checkpoints(workdir.checkpoints_path)
            checkpoints.save({"step": jnp.zeros((), jnp.int32), "params": params, "state": {}, "frozen": {}})
            checkpoints.close()
    return path


@pytest.fixture(scope="module")
def theta():
    return jax.tree.map(lambda x: x + 0.01, learned_optimizer(SECTION).init(jax.random.key(0)))


@pytest.fixture(scope="module")
def path(tmp_path_factory, theta):
    return a_run(tmp_path_factory.mktemp("learned") / "run", {"learned_optimizer": SECTION}, theta)


def test_theta_comes_back_with_its_hash(path, theta):
    found = restored(path)
    jax.tree.map(np.testing.assert_array_equal, found.theta, theta)
    assert found.sha256 == state_sha256(theta)


def test_it_moves_params_as_theta_does_in_any_chain(path, theta):
    """By name in research.optim: at a rate of 1 its own steps, at another as many times them; clipping comes before it."""
    own = learned_optimizer(SECTION).transformation(theta)
    expected, _ = own.update(PARAMS, own.init(PARAMS), PARAMS)
    for rate in (1.0, 0.5):
        tx = make({"name": "learned", "path": str(path), "learning_rate": rate, "clip": 1e6}, steps=10)
        state = tx.init(PARAMS)
        found, after = tx.update(PARAMS, state, PARAMS)
        np.testing.assert_allclose(found["w"], rate * expected["w"], rtol=1e-6)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        moved = optax.apply_updates(PARAMS, found)
        assert (jnp.abs(moved["w"]) <= jnp.abs(PARAMS["w"])).all()  # a gradient of w^2 / 2, so that it is a descent


def test_what_has_learned_nothing_is_refused_in_one_line(path, theta, tmp_path):
    plain = a_run(tmp_path / "plain", {"seed": 0}, theta)
    new = a_run(tmp_path / "new", {"learned_optimizer": SECTION})
    other = a_run(tmp_path / "other", {"learned_optimizer": {"name": "coordinatewise_rnn", "version": 1}}, theta)
    old = a_run(tmp_path / "old", {"learned_optimizer": {**SECTION, "version": 0}}, theta)
    members = a_run(tmp_path / "members", {"learned_optimizer": SECTION}, jax.tree.map(lambda x: jnp.stack([x, x]), theta))
    damaged = a_run(tmp_path / "damaged", {"learned_optimizer": SECTION}, theta)
    (damaged / "config.json").write_text("[]")
    learned = {"name": "learned", "learning_rate": 1.0}
    cases = [
        (damaged, "config.json holds a list, no config; restore it"),
        (tmp_path / "nowhere", "holds no run: there is no config.json in it"),
        (plain, "is a run that learned no optimizer: its config has no learned_optimizer"),
        (new, "has no theta yet: no checkpoint is there"),
        (other, "theta: decays/momentum: expected no such leaf, got float32[1]"),
        (old, "learned_optimizer.version=0 of learned_scales is not what this code computes; allowed: 1"),
        (members, "theta: decays/momentum: expected float32[1], got float32[2,1]"),
    ]
    for folder, said in cases:
        with pytest.raises(ValueError) as error:
            make({**learned, "path": str(folder)}, steps=10)
        assert said in str(error.value) and "\n" not in str(error.value), str(error.value)
    with pytest.raises(ValueError, match=f"the theta in {path} has {restored(path).sha256}; allowed: that one, or ''"):
        make({**learned, "path": str(path), "sha256": "0"}, steps=10)
    with pytest.raises(ValueError, match="optimizer.pth is unknown; allowed: .*; nearest: 'path'"):
        make({**learned, "pth": str(path)}, steps=10)


CONFIG = """
from configs.papers.mnist1d.config import get_config as mnist1d


def get_config(arg=""):
    config = mnist1d("smoke")
    config.optimizer = {"name": "learned", "path": "PATH", "learning_rate": 1.0}
    return config
"""


@pytest.mark.slow
def test_a_learned_optimizer_is_trained_by_one_config_and_used_by_another(tmp_path, capsys):
    """gnomon train, twice: theta of the first run trains the second, in whose record its hash is; it resumes and repeats."""
    learner = tmp_path / "learner"
    assert train.main(["--config", "configs/papers/learned_optimizer/config.py:smoke", "--workdir", str(learner)]) == 0
    found = restored(learner)
    begun = learned_optimizer(json.loads((learner / "config.json").read_text())["learned_optimizer"]).init(jax.random.key(0))
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(jax.tree.leaves(found.theta), jax.tree.leaves(begun)))
    config = tmp_path / "user.py"
    config.write_text(CONFIG.replace("PATH", str(learner)))
    for name in ("once", "again"):
        assert train.main(["--config", str(config), "--workdir", str(tmp_path / name)]) == 0
        versions = json.loads((tmp_path / name / "versions.json").read_text())
        assert versions["read"] == {"optimizer.path": found.sha256}
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("once", "again")]
    assert summaries[0]["state_sha256"] == summaries[1]["state_sha256"]
    state = Checkpoints(tmp_path / "once" / "checkpoints", read_only=True)
    carried = state.load(state.latest())["opt"]
    assert "theta" in json.dumps(jax.tree.map(lambda x: 0, carried))  # the checkpoint goes on without the learner's run
