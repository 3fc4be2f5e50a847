"""What clusters are given. No published schema of JobSet can be had by a package: its shape is checked here, field by field."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from research.launch import main

REPO = Path(__file__).resolve().parents[2]
TRAIN = ["--", "train", "--config", "configs/lm/stdlib.py:smoke", "--config.mesh.fsdp=-1"]


def written(capsys, *words: str) -> str:
    assert main([*words, "--dry-run", *TRAIN]) == 0
    return capsys.readouterr().out


def test_a_jobset_restarts_all_after_a_preemption_and_a_crash_and_not_after_bad_input(capsys):
    made = json.loads(written(capsys, "--engine", "jobset", "--nodes", "4", "--restarts", "5", "--claim", "disk:/data"))
    assert (made["apiVersion"], made["kind"], set(made)) == (
        "jobset.x-k8s.io/v1alpha2", "JobSet", {"apiVersion", "kind", "metadata", "spec"})  # fmt: skip
    spec = made["spec"]
    assert set(spec) <= {"coordinator", "failurePolicy", "network", "replicatedJobs", "successPolicy", "suspend"}
    (workers,) = spec["replicatedJobs"]
    assert set(workers) == {"name", "replicas", "template"} and set(spec["network"]) == {"enableDNSHostnames", "subdomain"}
    job = workers["template"]["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"], job["backoffLimit"]) == ("Indexed", 4, 4, 0)
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy is refused with any other
    (container,) = pod["containers"]
    environ = {e["name"]: e for e in container["env"]}
    assert environ["GNOMON_COORDINATOR"]["value"] == "gnomon-workers-0-0.gnomon:8476"
    assert environ["GNOMON_PROCESSES"]["value"] == "4"
    assert "job-completion-index" in environ["GNOMON_PROCESS"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert environ["GNOMON_STOPPED"]["value"] == "75"  # with 0 a run that was asked to stop would be done
    assert container["command"][:3] == ["python", "-m", "research.train"] and container["workingDir"] == "/data"

    policy = spec["failurePolicy"]
    assert policy["maxRestarts"] == 5 and set(policy) == {"maxRestarts", "rules"}
    disrupted, bad = job["podFailurePolicy"]["rules"]
    assert disrupted == {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert bad["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2, 75]}
    for rule in policy["rules"]:
        assert set(rule) == {"name", "action", "onJobFailureReasons", "onJobFailureMessagePatterns"}
        assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
    assert [rule["action"] for rule in policy["rules"]] == ["RestartJobSetAndIgnoreMaxRestarts", "FailJobSet"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--name", "My_Run"], "--name 'My_Run'; allowed: up to 40 small letters"),
        (["--claim", "disk"], "--claim 'disk'; allowed: NAME:PATH"),
    ],
)
def test_names_that_kubernetes_would_refuse_are_refused_here(words, says, capsys):
    with pytest.raises(SystemExit):
        main(["--engine", "jobset", "--dry-run", *words, *TRAIN])
    assert says in capsys.readouterr().err


def test_nothing_is_submitted(capsys):
    with pytest.raises(SystemExit):
        main(["--engine", "jobset", *TRAIN])
    assert "submits nothing; allowed: with --dry-run" in capsys.readouterr().err


def test_a_batch_script_starts_a_process_a_task_and_is_queued_again_after_a_preemption():
    options = ["--engine", "slurm", "--nodes", "2", "--processes", "8", "--heartbeat", "30", "--time", "90", "--dry-run"]
    command = [sys.executable, "-m", "research", "launch", *options, *TRAIN]
    script = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout
    for line in ("--nodes=2", "--ntasks-per-node=8", "--time=90", "--requeue", "--signal=TERM@120"):
        assert f"#SBATCH {line}\n" in script
    assert "export GNOMON_HEARTBEAT=30" in script and "--kill-on-bad-exit=1" in script
    assert script.rstrip().endswith("python -m research.train --config configs/lm/stdlib.py:smoke --config.mesh.fsdp=-1")


def test_without_submitit_it_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit.slurm.slurm", None)
    with pytest.raises(SystemExit):
        main(["--engine", "slurm", "--dry-run", *TRAIN])
    assert "needs submitit" in capsys.readouterr().err
