"""`gnomon train --config C [--workdir W] [--config.key=value ...]`: trains what a config says.

The same command again goes on with an interrupted run; on a finished one it shows the results.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research import cli
from research.core import loop, preflight, processes
from research.core.batches import from_function
from research.core.checkpoint import Checkpoints
from research.core.config import find, flat, load_config, parse_overrides, split_name
from research.core.flops import step_flops
from research.core.hooks import JsonLines
from research.core.interrupts import interrupts
from research.core.loop import INTERRUPTED, Outcome
from research.core.memory import keep_freed_memory
from research.core.progress import Progress, measured_matmul_peak
from research.core.report import write_report
from research.core.tensorboard import TensorBoard
from research.core.types import Stage, Variables
from research.core.workdir import FINISHED, OVERFIT, Workdir, package_versions, plain_config
from research.dry_run import described, pipeline_lines
from research.experiment import Experiment, Table, Text, build, members_of, run
from research.intervals import t_interval


def parser() -> argparse.ArgumentParser:
    p = cli.parser(
        "train",
        "Train what a config says, in a folder that explains itself. The same command goes on with an interrupted run.",
        "--config configs/lm/stdlib.py:smoke --config.optimizer.learning_rate=0.01",
    )
    p.add_argument("--config", required=True, metavar="PATH[:ARG]", help="a config file, with one of its arguments")
    p.add_argument("--workdir", help="the run's folder (default: runs/<config>-<arg>)")
    p.add_argument("--resume", action="store_true", help="go on with the workdir's run though the config has changed")
    p.add_argument("--overwrite", action="store_true", help="replace the workdir's run")
    p.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="N runs, seeds from config.seed on, with mean and interval"
    )
    p.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    p.add_argument("--dry-run", action="store_true", help="print parameters, bytes and FLOPs a step, and stop")
    p.add_argument("--overfit-one-batch", action="store_true", help="train on the first batch alone: the loss should vanish")
    return p


def default_workdir(name: str, suffix: str = "") -> Path:
    """runs/<config>-<arg>, where the command is run."""
    path, arg = split_name(name)
    stem = Path(path).with_suffix("").as_posix().lstrip("./").removeprefix("configs/").replace("/", "-")
    return Path("runs") / "-".join(filter(None, [stem, arg, suffix]))


def main(argv: Sequence[str] | None = None) -> int:
    args, rest = parser().parse_known_args(argv)
    keep_freed_memory()
    with cli.one_line_errors("train"), interrupts(raising=True):
        processes.join()
        overrides = parse_overrides(rest)
        if args.seeds < 1:
            raise ValueError(f"--seeds {args.seeds}: 1 or more are wanted")
        if args.seeds > 1:
            return several(args, overrides)
        path = Path(args.workdir) if args.workdir else default_workdir(args.config, "overfit" * args.overfit_one_batch)
        return one(args, load_config(args.config, overrides), path)
    return cli.FAILED


def one(args: argparse.Namespace, config: Any, path: Path) -> int:
    """One run: looked at, or trained in `path`. The exit code."""
    if args.print_config:
        print(json.dumps(plain_config(config), indent=2))
        return 0
    if args.dry_run:
        print(described(build(config, args.config)))
        return 0
    given = plain_config(config) | ({OVERFIT: True} if args.overfit_one_batch else {})
    if processes.count() > 1:
        processes.check_same(started_with(given, args.config))
    workdir = Workdir.create(path, given, args.resume, args.overwrite)
    if workdir.status == FINISHED:
        say(f"{path} is finished; --overwrite runs it anew")
        say(cli.table(results_table(workdir.summary())))
        return 0
    experiment = build(config, args.config)
    if args.overfit_one_batch:
        experiment = overfitted(experiment)
    preflight.check(
        experiment.stages,
        experiment.evaluations,
        steps_per_call=experiment.steps_per_call,
        log_every=experiment.log_every,
        checkpoints=Checkpoints(workdir.checkpoints_path, **experiment.checkpoints),
        mesh=experiment.mesh,
        changed=workdir.changed,
    )
    with workdir:
        workdir.begin(experiment.read)
        for line in pipeline_lines(experiment.mesh):
            say(line)
        outcome, seconds = trained(experiment, workdir)
        if outcome.reason == INTERRUPTED:
            say(f"interrupted at step {int(outcome.state['step'])}: saved in {path}; the same command goes on")
            return int(os.environ.get(processes.STOPPED, 0))
        if outcome.reason != loop.FINISHED:
            say(f"stopped at step {int(outcome.state['step'])}: {outcome.reason}")
        finish(experiment, workdir, outcome, seconds)
    folder = shlex.quote(str(path))
    sampling = (
        f"; more samples: gnomon sample --config {shlex.quote(args.config)} --workdir {folder}" if experiment.sample else ""
    )
    say(f"see {path / 'report.html'}; curves: tensorboard --logdir {folder}{sampling}")
    return 0


def trained(experiment: Experiment, workdir: Workdir) -> tuple[Outcome, float]:
    """Runs the experiment's stages in a workdir that has begun; (how it ended, wall seconds with those of earlier starts)."""
    lines = JsonLines(workdir.metrics_path)
    hooks = [make(str(workdir.metrics_path)) for make in experiment.history_hooks]
    if processes.index() == 0:
        hooks = [lines, TensorBoard(workdir.events_path), *hooks, progress(experiment)]
    checkpoints = Checkpoints(workdir.checkpoints_path, **experiment.checkpoints)
    try:
        outcome = run(experiment, hooks=hooks, checkpoints=checkpoints)
    finally:
        checkpoints.close()
    return outcome, lines.seconds


def progress(experiment: Experiment) -> Progress:
    """The live view: evaluation results, rate in the experiment's own unit, MFU against a measured matmul peak."""
    unit, count = next(iter(experiment.units.items()), ("steps", 1))
    devices = 1 if jax.default_backend() == "cpu" or experiment.mesh is None else experiment.mesh.mesh.size
    return Progress(
        experiment.show,
        experiment.derived,
        per_step=count,
        unit=unit,
        flops_per_step=step_flops(experiment.stages[-1].learner),
        peak=devices * measured_matmul_peak(experiment.dtype),
    )


def finish(experiment: Experiment, workdir: Workdir, outcome: Outcome, seconds: float) -> None:
    """Shows what the run came to, and writes report.html and, last, summary.json; the tables and samples by process 0, of
    variables that it has been given whole."""
    variables = experiment.stages[-1].learner.variables(outcome.state)
    if processes.count() > 1 and experiment.closing:
        variables = jax.tree.map(processes.on_host, variables)
    if processes.index() == 0:
        show(experiment, workdir, outcome, variables)
    summary = workdir.finish(outcome.results, outcome.state, seconds)
    say(cli.table(results_table(summary)))


def show(experiment: Experiment, workdir: Workdir, outcome: Outcome, variables: Variables) -> None:
    """Prints the closing tables and samples, and writes them and report.html."""
    key = jax.random.key(experiment.seed)
    if experiment.closing:
        print("making the closing tables and samples")
    shown = [item for closing in experiment.closing for item in closing(variables, outcome.results, key)]
    for item in shown:
        print(f"\n{item.title}\n{item.body}" if isinstance(item, Text) else cli.table(item))
    tables = [item for item in shown if isinstance(item, Table)]
    samples = [item for item in shown if isinstance(item, Text)]
    events, step = TensorBoard(workdir.events_path), int(outcome.state["step"])
    events.start(step, step, experiment.stages[-1].learner, len(experiment.stages) - 1)
    events.evaluated(step, "closing", {item.title: item.body for item in samples})
    events.close()
    write_report(workdir.path, outcome.results, tables=tables, samples=samples)


def say(text: str) -> None:
    """Prints in process 0; the others would say the same."""
    if processes.index() == 0:
        print(text)


def started_with(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What must be the same in all processes of a run: the config, by key, and the versions and contents of what runs."""
    versions = {f"version of {package}": version for package, version in package_versions().items()}
    packages = [cli.PACKAGE, cli.PACKAGE.parent / "pallas_kernels"]
    code = {f"code of {package.name}": processes.code_sha256(package) for package in packages}
    file = {"config file": hashlib.sha256(find(name).read_bytes()).hexdigest()}
    return {f"config.{key}": value for key, value in flat(config)} | versions | code | file


def results_table(summary: Mapping[str, Any]) -> Table:
    return Table("Results", ("name", "value"), [(k, cli.shown(v)) for k, v in summary.items()])


def overfitted(experiment: Experiment) -> Experiment:
    """The same, on the first batch alone and without evaluations: a loss that does not vanish points at a bug."""

    def constant(stage: Stage) -> Stage:
        batch = next(stage.batches.open())
        return stage._replace(batches=from_function(lambda i: batch, fingerprint=f"first of {stage.batches.fingerprint}"))

    return experiment._replace(
        stages=[constant(s) for s in experiment.stages], evaluations={}, closing=(), history_hooks=(), checkpoints={}
    )


def several(args: argparse.Namespace, overrides: Mapping[str, str]) -> int:
    """One run a seed, below one workdir; then each result's mean and 95% interval (Student's t) over the seeds."""
    base = Path(args.workdir) if args.workdir else default_workdir(args.config, "seeds")
    config = load_config(args.config, overrides)
    if "learner" in config and members_of(config):
        raise ValueError(f"--seeds {args.seeds} of a population: its members are seeds already; allowed: one of the two")
    if "seed" not in config:
        raise ValueError(f"--seeds {args.seeds}: the config has no key seed for its build to use; allowed: one that has")
    first = config.seed
    summaries = []
    for seed in range(first, first + args.seeds):
        path = base / f"seed-{seed}"
        print(f"seed {seed} in {path}")
        code = one(args, load_config(args.config, {**overrides, "seed": str(seed)}), path)
        summary = path / "summary.json"
        if code or not summary.exists():
            return code
        summaries.append(json.loads(summary.read_text()))
    print(cli.table(Table(f"{args.seeds} seeds", ("name", "mean", "95% interval"), over_seeds(summaries))))
    return 0


def over_seeds(summaries: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """(name, mean, interval) of each number that all summaries hold."""
    rows = []
    for name, value in summaries[0].items():
        if isinstance(value, int | float) and name not in ("steps", "wall_seconds"):
            values = np.array([s[name] for s in summaries], float)
            half = t_interval(values)
            rows.append((name, f"{values.mean():.5g}", f"+- {half:.2g}"))
    return rows


if __name__ == "__main__":
    sys.exit(main())
