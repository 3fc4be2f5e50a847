"""A run that has been trained, with the experiment that it came from: what `evaluate` and `sample` begin with."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from research.core.config import ConfigError, find, flat, load_config
from research.core.types import Variables
from research.core.workdir import Run, config_of, load_run
from research.experiment import Experiment, build
from research.train import default_workdir


class Trained(NamedTuple):
    experiment: Experiment
    run: Run
    variables: Variables
    path: Path


def opened(args: argparse.Namespace, overrides: Mapping[str, str]) -> Trained:
    """The run that `args` names (`cli.trained_run`). Its config is the one it was trained by, under `overrides`.

    Raises ValueError (one line) where there is no such run, no checkpoint in it, or a key in its config that is no more.
    """
    find(args.config)
    path = Path(args.workdir) if args.workdir else default_workdir(args.config)
    trained_by: dict[str, Any] = dict(flat(config_of(path)))
    try:
        load_config(args.config, trained_by)
    except ConfigError as error:
        raise ConfigError(f"{path} was trained by other keys than {args.config} has now: {error}") from None
    config = load_config(args.config, {**trained_by, **overrides})
    experiment = build(config, args.config)
    run = load_run(path, lambda stage: experiment.stages[stage].learner, best=args.best, mode=args.mode)
    if run.variables is None:
        raise ValueError(f"{path} has no checkpoint yet; allowed: a run that has saved one")
    return Trained(experiment, run, run.variables, path)
