"""What tells a process that it is one of several, and what they agree on; with real ones: tests/faults/test_processes.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from research.core import fatal_errors, placement, processes
from research.core.mesh import Layout
from research.core.types import Spec

OURS = {"GNOMON_COORDINATOR": "host:1", "GNOMON_PROCESSES": "4", "GNOMON_PROCESS": "3"}
WAITING = {"heartbeat_timeout_seconds": 100, "shutdown_timeout_seconds": 100}


def test_the_environment_tells_of_other_processes():
    assert processes.told_by({}) is None
    assert processes.told_by({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert processes.told_by(OURS) == WAITING | {"coordinator_address": "host:1", "num_processes": 4, "process_id": 3}
    assert processes.told_by({"SLURM_STEP_NUM_TASKS": "2"}) == WAITING | {"cluster_detection_method": "slurm"}
    assert processes.told_by(OURS | {"GNOMON_HEARTBEAT": "5"})["heartbeat_timeout_seconds"] == 5


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"GNOMON_PROCESSES": ""}, "the environment lacks GNOMON_PROCESSES"),
        ({"GNOMON_PROCESS": "4"}, "GNOMON_PROCESS=4 of GNOMON_PROCESSES=4; allowed: 0 to 3"),
        ({"GNOMON_PROCESSES": "many"}, "GNOMON_PROCESSES='many'; allowed: a whole number"),
        ({"GNOMON_HEARTBEAT": "0"}, "GNOMON_HEARTBEAT=0; allowed: 1 or more"),
    ],
)
def test_an_environment_that_does_not_fit_together_is_refused(changed, says):
    environ = {k: v for k, v in (OURS | changed).items() if v}
    with pytest.raises(ValueError, match=says):
        processes.told_by(environ)


def test_alone_everything_is_itself():
    assert (processes.count(), processes.index()) == (1, 0)
    assert processes.exchange("x", 3) == [3] and processes.first("x", lambda: (1, 2)) == (1, 2)
    assert processes.everywhere("x", lambda: 5) == 5
    processes.check_same({"a": 1})


FATAL = """F1129 03:25:37.5 2 client.h:80] Terminating process because the JAX distributed service detected fatal errors. \
This most likely indicates that another task died absl::Status: {}
*** Check failure stack trace: ***
    @     0x7fd4b4b40634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""
SILENT = "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1, 3\nThe tasks have crashed."


@pytest.mark.parametrize(
    ("status", "who"),
    [
        (SILENT, "process 1, 3 has stopped"),
        ("UNAVAILABLE: Failed to send RPC", "process 0, which coordinates, cannot be reached"),
    ],
)
def test_a_page_of_a_fatal_error_is_one_line(status, who):
    noise = (
        "E1129 03:25:37.549506   21955 coordination_service.cc:1549] [9] Use error polling:\n1\nThe tasks have crashed. Check\n"
    )
    given = f"a line\n{noise}Traceback\n{FATAL.format(status)}"
    script = Path(fatal_errors.__file__)
    out = subprocess.run([sys.executable, "-ISu", script], input=given, capture_output=True, text=True, check=True).stdout
    first, second, last = out.splitlines()
    assert (first, second) == ("a line", "Traceback") and who in last and "ends too" in last


def test_each_part_of_a_batch_goes_to_its_own_devices():
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    whole = np.arange(48.0).reshape(2, 8, 3)
    sharding = NamedSharding(mesh, jax.P(None, "data"))
    np.testing.assert_array_equal(placement.placed(whole, sharding), whole)
    np.testing.assert_array_equal(placement.placed(whole, sharding, 0, 1, 8), whole)
    layout = Layout(mesh, {"batch": ("data",)})
    specs = {"x": Spec((8, 3), np.float32, ("batch",)), "y": Spec((8,), np.int32, ("batch",))}
    assert placement.rows_here(layout.batch_shardings(specs), specs) == (0, 8)
    assert placement.rows_here(layout.batch_shardings(odd := specs | {"z": Spec((), np.int32)}), odd) is None


def test_code_is_told_apart_by_path_and_content(tmp_path):
    (tmp_path / "a.py").write_text("x")
    before = processes.code_sha256(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert processes.code_sha256(tmp_path) != before
