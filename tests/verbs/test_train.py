"""gnomon train as a user runs it: a folder that explains itself, and the same command again."""

from __future__ import annotations

import json

import pytest

from research.__main__ import main
from research.core.workdir import load_run

CONFIG = "tests/verbs/smoke_on_readme.py"
SMOKE = ["train", "--config", CONFIG]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished smoke run."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    assert main([*SMOKE, "--workdir", str(folder)]) == 0
    return folder


def test_the_folder_holds_all_of_a_run(finished):
    names = {p.name for p in finished.iterdir()}
    wanted = {"config.json", "versions.json", "metrics.jsonl", "events", "checkpoints", "summary.json", "report.html"}
    assert wanted <= names
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["steps"] >= 20 and len(summary["state_sha256"]) == 64
    assert 0 < summary["test/bits_per_byte"] < 9 and 0 < summary["val/bits_per_byte"] < 9
    assert "<svg" in (finished / "report.html").read_text()


def test_metrics_come_back_as_arrays(finished):
    steps, values = load_run(finished).metrics["train/loss"]
    assert len(steps) == len(values) and steps[-1] == load_run(finished).summary["steps"] and values[-1] < values[0]


def test_the_same_command_on_a_finished_run_shows_its_results(finished, capfd):
    before = (finished / "summary.json").read_bytes()
    assert main([*SMOKE, "--workdir", str(finished)]) == 0
    out = capfd.readouterr().out
    assert "is finished" in out and "test/bits_per_byte" in out
    assert (finished / "summary.json").read_bytes() == before


def test_a_folder_of_another_config_is_refused_and_overwritten_only_when_told(finished, capfd):
    other = [*SMOKE, "--workdir", str(finished), "--config.seed=1"]
    with pytest.raises(SystemExit) as ended:
        main(other)
    assert ended.value.code == 2 and "seed: was 0, given 1" in capfd.readouterr().err


def test_a_trained_run_is_measured_again_to_the_same_number(finished, capfd):
    assert main(["evaluate", "--config", CONFIG, "--workdir", str(finished), "--only", "test"]) == 0
    line = json.loads((finished / "evaluations.jsonl").read_text().splitlines()[-1])
    summary = json.loads((finished / "summary.json").read_text())
    assert line["test/bits_per_byte"] == summary["test/bits_per_byte"]


def test_a_trained_run_is_sampled_and_a_seed_repeats(finished, capfd):
    command = ["sample", "--config", CONFIG, "--workdir", str(finished), "--config.sample.tokens=12"]
    texts = []
    for seed in ("1", "1", "2"):
        assert main([*command, "--seed", seed]) == 0
        texts.append(capfd.readouterr().out)
    assert texts[0] == texts[1] != texts[2] and texts[0].startswith("def ")


def test_looking_at_a_config_trains_nothing(tmp_path, capfd):
    assert main([*SMOKE, "--print-config", "--workdir", str(tmp_path / "x")]) == 0
    assert json.loads(capfd.readouterr().out)["task"]["name"] == "language_model"
    assert main([*SMOKE, "--dry-run", "--workdir", str(tmp_path / "x")]) == 0
    out = capfd.readouterr().out
    assert "FLOPs a step" in out and "params" in out and not (tmp_path / "x").exists()


@pytest.mark.slow
def test_one_batch_is_overfitted(tmp_path, capfd):
    folder = tmp_path / "one"
    more = ["--config.train.steps=60", "--config.train.log_every=60", "--config.stream.batch=1", "--config.stream.length=16"]
    assert main([*SMOKE, "--overfit-one-batch", "--workdir", str(folder), *more]) == 0
    _, losses = load_run(folder).metrics["train/loss"]
    assert losses[-1] < 2.0


def test_several_seeds_end_in_a_mean_and_an_interval(tmp_path, capfd):
    (tmp_path / "alone.py").write_text(
        "from configs.papers.mnist1d import config\n"
        "def get_config(arg=''):\n"
        "    made = config.get_config('smoke')\n"
        "    made.learner = {'wrap': [], 'watch': {}}\n"
        "    return made\n"
    )
    folder = tmp_path / "s"
    assert main(["train", "--seeds", "2", "--workdir", str(folder), "--config", str(tmp_path / "alone.py")]) == 0
    found = [json.loads((folder / f"seed-{i}" / "summary.json").read_text())["test/nll"] for i in range(2)]
    rows = {
        line.split()[0]: line.split()[1:] for line in capfd.readouterr().out.split("2 seeds")[-1].splitlines() if line.strip()
    }
    assert found[0] != found[1]
    assert float(rows["test/nll"][0]) == pytest.approx(sum(found) / 2, rel=1e-3)
    half = 12.706 * abs(found[0] - found[1]) / 2  # Student's t of one degree of freedom, times the standard error
    assert float(rows["test/nll"][2]) == pytest.approx(half, rel=0.05)
