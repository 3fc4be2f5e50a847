"""The real thing, slow: a clone set up where nothing is as one would wish, and the project installed from a wheel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.packaging import house

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

OWN_CONFIG = '''
"""A config of someone's own, outside the repository, with its own build."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from research.core.batches import from_function
from research.core.types import Aux, Spec, Stage, Task
from research.experiment import Experiment
from research.learners import gradient

ARGS = ("smoke",)


def get_config(arg=""):
    return ConfigDict({"steps": 20, "learning_rate": 0.1})


def build(config):
    def init(key):
        return {"params": {"w": jnp.zeros((3,))}, "state": {}, "frozen": {}}

    def loss(variables, batch, key):
        error = batch["x"] @ variables["params"]["w"] - batch["y"]
        value = jnp.mean(jnp.square(error))
        n = jnp.float32(error.shape[0])
        return value, Aux(variables["state"], {"loss": (value * n, n)}, n)

    def batch(step):
        x = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (8, 3))
        return {"x": x, "y": x @ jnp.array([1.0, 2.0, 3.0])}

    specs = {"x": Spec((8, 3), jnp.float32, ("batch",)), "y": Spec((8,), jnp.float32, ("batch",))}
    axes = {"params": {"w": jax.P(None)}, "state": {}, "frozen": {}}
    task = Task(init, loss, {}, specs, axes, {})
    return Experiment([Stage(gradient(task, optax.sgd(config.learning_rate)), from_function(batch), config.steps)])
'''


def run(command, **options) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=1500, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def copy(to: Path) -> Path:
    """The project as it is in the working tree, without what git ignores; a tree that came without git is copied whole."""
    if not (house.ROOT / ".git").exists():
        shutil.copytree(house.ROOT, to, ignore=shutil.ignore_patterns(".venv*", "runs", "build", "*.egg-info", "__pycache__"))
        return to
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=house.ROOT).stdout
    for name in filter(None, listed.split("\0")):
        if (house.ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(house.ROOT / name, to / name)
    return to


def plain(**more: str) -> dict[str, str]:
    """The environment as a user has it: nothing of the test run's own."""
    dropped = ("PYTHON", "COV_", "COVERAGE_", "XLA_", "PYTEST_", "MPL", "IPYTHON", "JUPYTER", "MAKE", "MFLAGS", "VIRTUAL_ENV")
    return {key: value for key, value in os.environ.items() if not key.startswith(dropped)} | more


def test_a_clone_in_a_path_with_spaces_without_a_home_trains(tmp_path):
    root = tmp_path / "a clone, it's here"
    if (house.ROOT / ".git").exists():
        run(["git", "clone", "--quiet", house.ROOT, root])
    else:
        copy(root)
    # HOME is where nothing can be written, not even by root; the other settings are for someone else's Python
    odd = plain(PYTHON=house.base_python(), HOME="/dev/null", PYTHONPATH=str(tmp_path), PIP_USER="1", PYTHONOPTIMIZE="2")
    (tmp_path / "jax.py").write_text("raise SystemExit('PYTHONPATH got through')")
    made = run(["make", "setup"], cwd=root, env=odd)
    assert ".venv is ready" in made.stdout
    trained = run(["make", "train", "CONFIG=configs/lm/stdlib.py:smoke"], cwd=root, env=odd)
    assert "set-up:" not in trained.stdout
    summaries = list((root / "runs").glob("*/summary.json"))
    assert len(summaries) == 1 and "state_sha256" in json.loads(summaries[0].read_text())
    run(["make", "test", "ARGS=tests/core/test_names.py --no-cov"], cwd=root, env=odd)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """An environment with the project from its wheel, and everything else from the environment that the tests run in."""
    folder = tmp_path_factory.mktemp("installed")
    copy(folder / "source")
    build = copy(folder / "build")  # setuptools leaves its own files where it builds
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, build])
    run([house.base_python(), "-m", "venv", "--without-pip", folder / "venv"])
    wheel = next(folder.glob("gnomon-*.whl"))
    run([*pip, "--python", folder / "venv" / "bin" / "python", "install", "--no-deps", "--no-index", wheel])
    site = next((folder / "venv" / "lib").glob("python*/site-packages"))
    (site / "lock.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shutil.rmtree(build)
    return folder


def test_the_wheel_holds_the_packages_and_the_configs(installed):
    names = set(zipfile.ZipFile(next(installed.glob("*.whl"))).namelist())
    source = installed / "source"
    modules = {path.relative_to(source).as_posix() for path in (source / "research").rglob("*.py")}
    configs = {f"research/{path.relative_to(source).as_posix()}" for path in (source / "configs").rglob("*.*")}
    assert "research/core/types.py" in modules and "research/configs/lm/stdlib.py" in configs
    assert modules | configs <= names, sorted((modules | configs) - names)
    assert not [name for name in names if name.split("/")[0] not in ("research", "pallas_kernels") and "dist-info" not in name]


def test_an_installed_gnomon_trains_its_own_configs_and_those_of_others(installed, tmp_path):
    gnomon = installed / "venv" / "bin" / "gnomon"
    (tmp_path / "mine.py").write_text(OWN_CONFIG)
    assert "train" in run([gnomon, "--help"], cwd=tmp_path, env=plain()).stdout
    where = run([installed / "venv/bin/python", "-c", "import research; print(research.__file__)"], cwd=tmp_path, env=plain())
    assert where.stdout.startswith(str(installed))
    run([gnomon, "train", "--config", "mine.py", "--workdir", "out"], cwd=tmp_path, env=plain())
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 20
    run([gnomon, "train", "--config", "configs/lm/stdlib.py:smoke", "--dry-run"], cwd=tmp_path, env=plain())
