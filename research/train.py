"""`gnomon train --config C [--workdir W] [--config.key=value ...]`: trains what a config says.

The same command again goes on with an interrupted run; on a finished one it shows the results.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from research import cli
from research.core.checkpoint import Checkpoints
from research.core.config import load_config, parse_overrides, split_name
from research.core.hooks import JsonLines
from research.core.loop import INTERRUPTED, Outcome
from research.core.tensorboard import TensorBoard
from research.core.workdir import FINISHED, Workdir, plain_config
from research.experiment import Experiment, Table, Text, build, run

INTERRUPTED_LINE = "interrupted at step {step}: saved in {path}; the same command goes on"


def parser() -> argparse.ArgumentParser:
    p = cli.parser(
        "train",
        "Train what a config says, in a folder that explains itself. The same command goes on with an interrupted run.",
        "--config configs/lm/stdlib.py:smoke --workdir runs/first --config.optimizer.learning_rate=0.01",
    )
    p.add_argument("--config", required=True, metavar="PATH[:ARG]", help="a config file, with one of its arguments")
    p.add_argument("--workdir", help="the run's folder (default: runs/<config>-<arg>)")
    p.add_argument("--resume", action="store_true", help="go on with the workdir's run though the config has changed")
    p.add_argument("--overwrite", action="store_true", help="replace the workdir's run")
    p.add_argument("--seeds", type=int, default=1, metavar="N", help="N runs, seeds from config.seed on, with mean and interval")
    p.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    p.add_argument("--dry-run", action="store_true", help="print parameters, bytes and FLOPs a step, and stop")
    p.add_argument("--overfit-one-batch", action="store_true", help="train on the first batch alone: the loss should vanish")
    return p


def default_workdir(name: str) -> Path:
    path, arg = split_name(name)
    return Path("runs") / "-".join(filter(None, [Path(path).with_suffix("").as_posix().removeprefix("configs/").replace("/", "-"), arg]))
