"""What was trained is kept: a command that is refused, or another kind of run, changes nothing of it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from research import reproduce
from research.__main__ import main

CONFIG = "configs/papers/mnist1d/config.py:smoke"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of a small population."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    assert train(folder) == 0
    return folder


def train(folder: Path, *more: str, config: str = CONFIG) -> int:
    return main(["train", "--config", config, "--workdir", str(folder), *more])


def content(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    "more, says",
    [
        (["--resume", "--config.model.kind=cnn"], "model.kind: was 'mlp', given 'cnn'"),
        (["--resume", "--config.train.log_every=7"], "is not a multiple of steps_per_call"),
        (["--overwrite", "--config.train.log_every=7"], "is not a multiple of steps_per_call"),
        (["--overwrite", "--config.stream.batch=100000"], "batch"),
        (["--overfit-one-batch"], "overfit_one_batch: was absent, given True"),
    ],
)
def test_a_refused_command_changes_nothing(finished, more, says, capfd):
    before = content(finished)
    with pytest.raises(SystemExit) as ended:
        train(finished, *more)
    assert ended.value.code == 2 and says in capfd.readouterr().err
    assert content(finished) == before and "summary.json" in before


def test_a_run_whose_keys_are_no_more_is_told_in_one_line(finished, tmp_path, capfd):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    config = json.loads((folder / "config.json").read_text())
    config["model"]["pattern"] = "L"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--config", CONFIG, "--workdir", str(folder)])
    (line,) = capfd.readouterr().err.splitlines()
    assert ended.value.code == 2 and f"{folder} was trained by other keys" in line and "model.pattern: no such key" in line


def test_measurements_of_a_run_go_with_it(finished, tmp_path):
    assert train(tmp_path / "run") == 0
    assert main(["evaluate", "--config", CONFIG, "--workdir", str(tmp_path / "run")]) == 0
    assert train(tmp_path / "run", "--overwrite", "--config.seed=3") == 0
    assert not (tmp_path / "run" / "evaluations.jsonl").exists()


@pytest.mark.slow
def test_a_run_on_a_mesh_is_measured_again_and_starts_from_one_without(tmp_path):
    config = str(tmp_path / "alone.py")
    Path(config).write_text(
        "from configs.papers.mnist1d import config\n"
        "def get_config(arg=''):\n"
        "    made = config.get_config('smoke')\n"
        "    made.learner = {'wrap': [], 'watch': {}}\n"
        "    return made\n"
    )
    first, folder = tmp_path / "first", tmp_path / "run"
    assert train(first, config=config) == 0
    assert train(folder, "--config.mesh.data=2", f"--config.warm_start.workdir={first}", config=config) == 0
    assert main(["evaluate", "--config", config, "--workdir", str(folder), "--only", "test"]) == 0
    line = json.loads((folder / "evaluations.jsonl").read_text())
    assert line["test/nll"] == json.loads((folder / "summary.json").read_text())["test/nll"]


def test_a_changed_config_is_no_result_of_a_paper(tmp_path, capfd):
    """The recorded lines stay as they are, and what ran is said not to be recorded."""
    file = reproduce.PAPERS / "mnist1d" / "results.jsonl"
    before = file.read_bytes()
    changed = ["--config.train.steps=50", "--config.train.log_every=50", "--config.checkpoint.every=50"]
    assert main(["reproduce", "mnist1d", "--only", "linear", "--workdir", str(tmp_path), *changed]) == 0
    assert file.read_bytes() == before and "not recorded" in capfd.readouterr().out


CLAIM = """
[[claim]]
name = "ours"
arg = "a"
source = "none"
metric = "test/accuracy"
published = 0.9
accept = {at_least = 0.8}
deviations = "none"
"""


def test_results_keep_their_intervals_and_are_written_once(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "PAPERS", tmp_path)
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "claims.toml").write_text(CLAIM)
    versions = dict.fromkeys(("git", "python", "jax", "jaxlib", "flax", "optax", "numpy", "devices")) | {
        "cpu": {"model": "a", "cores": 2}
    }

    def kept(**summary):
        told = {"state_sha256": "s", "wall_seconds": 1.0, **summary}
        reproduce.append("some", reproduce.claims("some"), told, versions, ConfigDict({"seed": 0}))
        ((*_, ours, _, verdict),) = reproduce.table("some").rows
        return ours, verdict, len(reproduce.results("some"))

    assert kept(**{"test/accuracy": 0.85}) == ("0.85 (1 seed)", "met", 1)
    assert kept(**{"test/accuracy": 0.85, "test/accuracy_interval": 0.0123}) == ("0.85 +- 0.012 (1 seed)", "met", 2)
    assert kept(**{"test/accuracy": 0.85, "test/accuracy_interval": 0.0123}) == ("0.85 +- 0.012 (1 seed)", "met", 2)
    assert kept(**{"test/accuracy": [0.7, 0.8], "state_sha256": "t"}) == ("0.75 (0.7 to 0.8, 2 seeds)", "MISSED", 4)
