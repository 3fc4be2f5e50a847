"""Gnomon: research ideas as transforms of pure functions, and one loop that trains whatever they compose to.

from research import build, fit, load_config, load_run, run
"""

from __future__ import annotations

import importlib
from typing import Any

# Found when asked for, so that a package of the project does not load the ones above it.
_HOME = {
    "load_config": "research.core.config",
    "fit": "research.core.loop",
    "load_run": "research.core.workdir",
    "Experiment": "research.experiment",
    "build": "research.experiment",
    "run": "research.experiment",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'research' has no attribute {name!r}; it has {', '.join(_HOME)}")
    return getattr(importlib.import_module(_HOME[name]), name)
