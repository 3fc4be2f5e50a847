"""The toy run, in process 1 with a line of the code changed since process 0 was started."""

from __future__ import annotations

from research.core import processes
from tests.faults.toy_run import ARGS, build, get_config

__all__ = ["ARGS", "build", "get_config"]

if processes.index() == 1:
    _hashed = processes.code_sha256
    processes.code_sha256 = lambda package: f"{_hashed(package)} and a line more"
