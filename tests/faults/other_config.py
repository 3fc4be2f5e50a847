"""The toy run with a seed that differs by process, as one started from another checkout or by another hand would have."""

from __future__ import annotations

import os

from research.core import processes
from tests.faults import toy_run
from tests.faults.toy_run import ARGS, build

__all__ = ["ARGS", "build", "get_config"]


def get_config(arg: str = ""):
    config = toy_run.get_config(arg)
    config.seed = int(os.environ.get(processes.INDEX, 0))
    return config
