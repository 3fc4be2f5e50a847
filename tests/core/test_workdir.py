"""A run's folder: nobody's work is overwritten, nothing is left behind, and it can be read back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from research.core import workdir as module
from research.core.checkpoint import CheckpointError, Checkpoints, state_sha256
from research.core.hooks import JsonLines
from research.core.types import Learner
from research.core.workdir import FINISHED, NEW, UNFINISHED, Workdir, differences, load_run, plain_config, versions
from tests.core.saving import Saver, state_at

CONFIG = {"seed": 0, "model": {"width": 192, "layers": [1, 2]}, "data": {"globs": ("a", "b"), "limit": None}}
OTHER = {**CONFIG, "model": {"width": 256, "layers": [1, 2]}}
ROOT = Path(__file__).parents[2]


class Opt(NamedTuple):
    count: jax.Array
    trace: dict


def state_of(step: int) -> dict:
    return {
        "step": jnp.int32(step),
        "params": {"w": jnp.full((2, 3), float(step))},
        "state": {},
        "frozen": {"t": jnp.arange(2.0)},
        "opt": (Opt(jnp.int32(step), {"w": jnp.zeros(2)}),),
    }


def trained(path: Path, config=CONFIG, finish=True, steps=(10, 20)) -> dict:
    """A run as the verbs make it."""
    with Workdir.create(path, config) as workdir:
        workdir.begin()
        log = JsonLines(workdir.metrics_path)
        log.start(0, 20, None)
        checkpoints = Checkpoints(workdir.checkpoints_path, best="val/x")
        for step in steps:
            log.log(step, {"loss": 1.0 / step})
            log.evaluated(step, "val", {"x": float(step)})
            checkpoints.save(state_of(step), metrics={"val/x": float(step)})
        checkpoints.close()
        log.close()
        return workdir.finish({"val/x": 20.0}, state_of(steps[-1]), seconds=12.3456) if finish else {}


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file() and p.name != ".lock"}


def test_create_makes_nothing_and_begin_makes_the_folder(tmp_path):
    path = tmp_path / "runs" / "a b" / "c"
    workdir = Workdir.create(path, CONFIG)
    assert workdir.status == NEW and not (tmp_path / "runs").exists()
    workdir.begin()
    assert json.loads((path / "config.json").read_text()) == plain_config(CONFIG)
    assert json.loads((path / "versions.json").read_text())["jax"] == jax.__version__
    workdir.close()


def test_a_start_that_fails_before_anything_is_trained_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), Workdir.create(tmp_path / "runs" / "a", CONFIG) as workdir:
        workdir.begin()
        JsonLines(workdir.metrics_path).start(0, 10, None)
        workdir.events_path.mkdir()
        raise RuntimeError("the batch does not fit")
    assert list(tmp_path.iterdir()) == []


def test_what_stood_beside_stays_when_a_failed_start_is_undone(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "other").mkdir()
    with Workdir.create(tmp_path / "runs" / "a", CONFIG) as workdir:
        workdir.begin()
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["other"]


def test_a_run_that_trained_stays_when_it_fails(tmp_path):
    trained(tmp_path / "a", finish=False)
    assert (tmp_path / "a" / "checkpoints").exists()


def test_the_same_config_goes_on_and_a_finished_run_is_recognized(tmp_path):
    trained(tmp_path / "a", finish=False)
    assert Workdir.create(tmp_path / "a", CONFIG).status == UNFINISHED
    shutil.rmtree(tmp_path / "a")
    summary = trained(tmp_path / "a")
    workdir = Workdir.create(tmp_path / "a", ml_collections.ConfigDict(CONFIG))
    assert workdir.status == FINISHED and workdir.summary() == summary
    assert summary == {"val/x": 20.0, "steps": 20, "wall_seconds": 12.346, "state_sha256": state_sha256(state_of(20))}


def test_another_config_is_refused_by_the_key_that_differs(tmp_path):
    trained(tmp_path / "a")
    before = tree(tmp_path / "a")
    with pytest.raises(
        ValueError, match=r"another config: model\.width: was 192, given 256; allowed: --resume, --overwrite"
    ) as caught:
        Workdir.create(tmp_path / "a", OTHER)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"extra: was absent, given 1 \(and 1 more\)"):
        Workdir.create(tmp_path / "a", {**OTHER, "extra": 1})
    assert tree(tmp_path / "a") == before


def test_resume_goes_on_under_the_new_config_and_remembers_the_old(tmp_path):
    trained(tmp_path / "a")
    with Workdir.create(tmp_path / "a", OTHER, resume=True) as workdir:
        assert workdir.status == UNFINISHED and workdir.changed == ["model.width: was 192, given 256"]
        workdir.begin()
        assert workdir.summary() is None  # not finished under this one
    assert json.loads((tmp_path / "a" / "config.json").read_text())["model"]["width"] == 256
    earlier = json.loads((tmp_path / "a" / "versions.json").read_text())["earlier"]
    assert earlier[0]["config_then"] == ["model.width: was 192, then 256"]
    assert Checkpoints(tmp_path / "a" / "checkpoints").latest().step == 20


def test_a_run_goes_on_on_another_mesh_without_being_asked_to(tmp_path):
    elsewhere = {**CONFIG, "mesh": {"fsdp": 8}}
    trained(tmp_path / "a", finish=False)
    with Workdir.create(tmp_path / "a", elsewhere) as workdir:
        assert workdir.status == UNFINISHED and workdir.changed == ["mesh.fsdp: was absent, given 8"]
        workdir.begin()
    assert json.loads((tmp_path / "a" / "config.json").read_text())["mesh"] == {"fsdp": 8}
    with pytest.raises(ValueError, match=r"another config: model\.width: was 192, given 256; allowed"):
        Workdir.create(tmp_path / "a", {**OTHER, "mesh": {"fsdp": 4}})
    trained(tmp_path / "b")
    assert Workdir.create(tmp_path / "b", elsewhere).status == FINISHED


def test_overwrite_deletes_the_run_at_begin_and_only_what_is_the_runs(tmp_path):
    trained(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    before = tree(tmp_path / "a")
    workdir = Workdir.create(tmp_path / "a", OTHER, overwrite=True)
    assert workdir.status == NEW and tree(tmp_path / "a") == before
    workdir.begin()
    assert set(tree(tmp_path / "a")) == {"config.json", "versions.json", "notes.txt"}
    workdir.close()
    assert (tmp_path / "a" / "notes.txt").exists()


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_a_folder_that_is_no_run_is_never_touched(tmp_path, options):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match=r"holds no run but is not empty \(thesis\.tex\)"):
        Workdir.create(tmp_path, CONFIG, **options)
    with pytest.raises(ValueError, match="is a file"):
        Workdir.create(tmp_path / "thesis.tex", CONFIG, **options)


def test_a_run_killed_before_it_trained_anything_is_in_nobodys_way(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text(json.dumps(plain_config(CONFIG)))
    (tmp_path / "a" / "metrics.jsonl").write_text("")
    workdir = Workdir.create(tmp_path / "a", OTHER)
    assert workdir.status == NEW
    workdir.begin()
    assert json.loads((tmp_path / "a" / "config.json").read_text())["model"]["width"] == 256
    workdir.close()


def test_resume_and_overwrite_together_are_refused(tmp_path):
    with pytest.raises(ValueError, match="both asked for"):
        Workdir.create(tmp_path, CONFIG, resume=True, overwrite=True)


def test_a_config_that_is_no_json_is_named(tmp_path):
    trained(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        Workdir.create(tmp_path / "a", CONFIG)


def test_one_process_at_a_time(tmp_path):
    trained(tmp_path / "a", finish=False)
    first = Workdir.create(tmp_path / "a", CONFIG)
    first.begin()
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()}; allowed: one process at a time") as caught:
        Workdir.create(tmp_path / "a", CONFIG)
    assert "\n" not in str(caught.value)
    first.close()
    second = Workdir.create(tmp_path / "a", CONFIG)
    second.begin()
    second.close()


def test_of_two_that_start_at_once_in_a_new_folder_one_is_refused(tmp_path):
    first, second = (Workdir.create(tmp_path / "a", CONFIG) for _ in range(2))
    first.begin()
    with pytest.raises(ValueError, match="in use"):
        second.begin()
    assert (tmp_path / "a" / "config.json").exists()
    first.close()
    trained(tmp_path / "b", finish=False)
    late = Workdir(tmp_path / "b", plain_config(CONFIG), NEW, [], overwrite=False)
    with pytest.raises(ValueError, match="taken by another process in the meantime"):
        late.begin()
    assert Checkpoints(tmp_path / "b" / "checkpoints").latest().step == 20


@pytest.mark.faults
def test_the_lock_of_a_killed_process_is_released(tmp_path):
    trained(tmp_path / "a", finish=False)
    holder = textwrap.dedent("""
        import fcntl, os, sys, time
        lock = os.open(sys.argv[1], os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.pwrite(lock, b"4242", 0)
        print("held", flush=True)
        time.sleep(60)
    """)
    lock = tmp_path / "a" / ".lock"
    os.truncate(lock, 0)
    with subprocess.Popen([sys.executable, "-c", holder, str(lock)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="in use by process 4242"):
            Workdir.create(tmp_path / "a", CONFIG)
        process.send_signal(signal.SIGKILL)
    workdir = Workdir.create(tmp_path / "a", CONFIG)
    workdir.begin()
    workdir.close()


@pytest.mark.faults
def test_a_folder_that_cannot_be_made_is_said_in_one_line(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device", "config.json")

    monkeypatch.setattr(module.files, "write_whole", full)
    with pytest.raises(ValueError, match="runs/a cannot be written: No space left on device") as caught:
        Workdir.create(tmp_path / "runs" / "a", CONFIG).begin()
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_differences_name_keys_with_dots_in_order():
    was = plain_config({"b": 1, "a": {"x": (1, 2), "y": {}}, "c": None})
    given = plain_config({"b": 2, "a": {"x": [1, 2], "y": {"z": 1}}, "c": None})
    assert differences(was, given) == ["a.y: was {}, given absent", "a.y.z: was absent, given 1", "b: was 1, given 2"]
    assert differences(was, was) == []


def test_versions_say_what_ran(monkeypatch):
    told = versions()
    assert {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "cpu", "devices", "git"} <= set(
        told
    )
    assert told["jax"] == jax.__version__ and sum(told["devices"].values()) == jax.device_count()
    json.dumps(told)
    monkeypatch.setenv("PATH", "")
    assert versions()["git"] is None


def test_git_is_null_outside_a_repository_and_where_the_package_is_not_tracked(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "__file__", str(tmp_path / "workdir.py"))
    assert versions()["git"] is None
    subprocess.run(["git", "-C", tmp_path, "init", "-q"], check=True)
    (tmp_path / "workdir.py").write_text("")
    assert versions()["git"] is None
    subprocess.run(["git", "-C", tmp_path, "add", "workdir.py"], check=True)
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", tmp_path, *name, "commit", "-qm", "a"], check=True)
    head = subprocess.run(
        ["git", "-C", tmp_path, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    assert versions()["git"] == {"commit": head, "dirty": False}
    (tmp_path / "workdir.py").write_text("changed")
    assert versions()["git"]["dirty"] is True


# load_run


def test_load_run_gives_config_variables_metrics_and_summary(tmp_path):
    summary = trained(tmp_path / "a")
    run = load_run(tmp_path / "a")
    assert run.config == plain_config(CONFIG) and run.summary == summary and run.saved.step == 20
    assert set(run.variables) == {"params", "state", "frozen"} and float(run.variables["params"]["w"][0, 0]) == 20.0
    assert isinstance(run.variables["params"]["w"], jax.Array)
    steps, values = run.metrics["train/loss"]
    assert steps.tolist() == [10, 20] and np.allclose(values, [0.1, 0.05])
    assert state_sha256(run.state) == summary["state_sha256"]


def test_load_run_takes_the_best_where_a_metric_is_named(tmp_path):
    trained(tmp_path / "a")
    assert load_run(tmp_path / "a", best="val/x").saved.step == 10
    assert load_run(tmp_path / "a", best="val/x", mode="max").saved.step == 20
    with pytest.raises(ValueError, match="no checkpoint has the metric 'val/y'"):
        load_run(tmp_path / "a", best="val/y")


def test_load_run_with_the_learner_gives_its_own_variables_and_containers(tmp_path):
    trained(tmp_path / "a")
    learner = Learner(
        init=lambda key: state_of(0), step=None, methods={}, batch={}, axes=None,
        variables=lambda state: {"params": {"w": state["params"]["w"] / state["opt"][0].count}, "state": {}, "frozen": {}},
    )  # fmt: skip
    run = load_run(tmp_path / "a", learner=lambda stage: learner)
    assert isinstance(run.state["opt"][0], Opt) and float(run.variables["params"]["w"][0, 0]) == 1.0


def test_load_run_of_a_run_in_use_touches_nothing(tmp_path):
    trained(tmp_path / "a", finish=False)
    with Workdir.create(tmp_path / "a", CONFIG) as workdir:
        workdir.begin()
        (workdir.checkpoints_path / ".partial-0-30").mkdir()
        before = sorted(workdir.path.rglob("*"))
        assert load_run(tmp_path / "a").summary is None
        assert sorted(workdir.path.rglob("*")) == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax, when files go while it reads them
@pytest.mark.faults
def test_load_run_reads_a_run_whose_checkpoints_are_replaced_under_its_eyes(tmp_path, caplog):
    (tmp_path / "config.json").write_text("{}")
    with Saver() as saver:
        pid = saver.begin(tmp_path / "checkpoints", keep=1)
        while load_run(tmp_path).saved is None:
            time.sleep(0.01)
        steps = []
        while len(steps) < 15 or steps[-1] < 6:
            run = load_run(tmp_path)
            assert state_sha256(run.state) == state_sha256(state_at(run.saved.step))
            steps.append(run.saved.step)
        os.kill(pid, signal.SIGKILL)
        saver.ended()
    assert steps == sorted(steps)
    assert not [record for record in caplog.records if record.name.startswith("research")]  # nothing was called damaged


def test_load_run_before_the_first_checkpoint_and_where_there_is_none(tmp_path):
    with Workdir.create(tmp_path / "a", CONFIG) as workdir:
        workdir.begin()
        run = load_run(tmp_path / "a")
        assert run.state is None and run.variables is None and run.saved is None and run.metrics == {}
    with pytest.raises(ValueError, match="holds no run"):
        load_run(tmp_path / "nowhere")


@pytest.mark.faults
def test_load_run_says_when_no_checkpoint_is_intact(tmp_path):
    trained(tmp_path / "a")
    for path in (tmp_path / "a" / "checkpoints").glob("0-*/meta.json"):
        path.unlink()
    with pytest.raises(CheckpointError, match="intact"):
        load_run(tmp_path / "a")
