"""What a cluster is given to run a verb in several processes: a batch script for SLURM, a manifest for Kubernetes' JobSet.

Both schedulers start the processes, tell each its number, and start all again after a crash or a preemption; the verb goes on
from its last checkpoint. Nothing here watches over anything.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from research.core import processes

PORT = 8476  # of the coordinator, where process 0 has a machine of its own
GRACE = 120  # seconds between being asked to stop and being killed


def sbatch(command: Sequence[str], nodes: int, tasks_per_node: int, heartbeat: int, logs: Path, time: int) -> str:
    """The batch script, by submitit: `sbatch` it, from the project's folder. time: minutes.

    SLURM starts it again after a node has failed and after a preemption. Raises ValueError where submitit is not installed.
    """
    try:
        from submitit.slurm.slurm import _make_sbatch_string  # what submitit itself submits, without asking for a SLURM here
    except ImportError as error:
        raise ValueError("--engine slurm needs submitit: pip install 'gnomon[slurm]'") from error
    return _make_sbatch_string(
        shlex.join(command),
        logs,
        job_name="gnomon",
        nodes=nodes,
        ntasks_per_node=tasks_per_node,
        time=time,
        setup=[f"export {processes.HEARTBEAT}={heartbeat}"],
        srun_args=["--kill-on-bad-exit=1"],
        stderr_to_stdout=True,
        additional_parameters={"requeue": True, "signal": f"TERM@{GRACE}"},
    )


def jobset(command: Sequence[str], name: str, nodes: int, heartbeat: int, restarts: int, image: str, claim: str) -> str:
    """The manifest (JSON, as `kubectl apply -f` takes it) of one indexed Job of `nodes` pods.

    claim: "NAME:PATH", a volume claim that all pods can write, and where it is mounted; the command runs there.
    A pod that is preempted fails the Job, and all start again, which counts for nothing; so does a run that was asked to stop,
    with an exit code of its own for it, since with 0 the Job would be done. After a crash all start again `restarts` times; bad
    input (exit code 2) ends it. Raises ValueError (one line) on names that Kubernetes refuses.
    """
    volume, _, path = claim.partition(":")
    for what, given in (("--name", name), ("--claim", volume)):
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", given):
            raise ValueError(f"{what} {given!r}; allowed: up to 40 small letters, digits and -, a letter first")
    if not path.startswith("/"):
        raise ValueError(f"--claim {claim!r}; allowed: NAME:PATH, a volume claim and the absolute path where it is mounted")
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    container: dict[str, Any] = {
        "name": "worker",
        "image": image,
        "command": list(command),
        "workingDir": path,
        "env": [
            {"name": processes.COORDINATOR, "value": f"{name}-workers-0-0.{name}:{PORT}"},
            {"name": processes.COUNT, "value": str(nodes)},
            {"name": processes.INDEX, "valueFrom": index},
            {"name": processes.HEARTBEAT, "value": str(heartbeat)},
            {"name": processes.STOPPED, "value": str(processes.LOST)},
        ],
        "volumeMounts": [{"name": "runs", "mountPath": path}],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE,
        "containers": [container],
        "volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": volume}}],
    }
    failures = [
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {"containerName": "worker", "operator": "In", "values": [2, processes.LOST]}},
    ]
    job = {
        "completionMode": "Indexed",
        "completions": nodes,
        "parallelism": nodes,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": failures},
        "template": {"spec": pod},
    }

    def rule(name: str, action: str, pattern: str) -> dict[str, Any]:
        reasons, patterns = ["PodFailurePolicy"], [pattern]
        return {"name": name, "action": action, "onJobFailureReasons": reasons, "onJobFailureMessagePatterns": patterns}

    rules = [
        rule("preempted", "RestartJobSetAndIgnoreMaxRestarts", f"DisruptionTarget|exit code {processes.LOST}"),
        rule("badInput", "FailJobSet", "exit code 2"),
    ]
    manifest = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name},
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": name},
            "failurePolicy": {"maxRestarts": restarts, "rules": rules},
            "replicatedJobs": [{"name": "workers", "replicas": 1, "template": {"spec": job}}],
        },
    }
    return json.dumps(manifest, indent=2) + "\n"
