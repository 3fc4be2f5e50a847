"""`gnomon evaluate --config C [--workdir W]`: measures a trained run again."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import jax

from research import cli
from research.core import processes
from research.core.config import parse_overrides
from research.core.evaluate import evaluator_run
from research.core.mesh import entered
from research.core.names import choose
from research.core.workdir import plain_config
from research.experiment import Table
from research.trained import opened


def parser() -> argparse.ArgumentParser:
    p = cli.parser(
        "evaluate",
        "Measure a trained run again, by its own evaluations, under overrides if any. Appends to its evaluations.jsonl.",
        "--config configs/lm/stdlib.py:smoke --only test --config.evaluate.context=128",
    )
    cli.trained_run(p)
    p.add_argument("--only", metavar="NAME", help="one of the evaluations, such as test (default: all)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args, rest = parser().parse_known_args(argv)
    with cli.one_line_errors("evaluate"):
        processes.join()
        overrides = parse_overrides(rest)
        experiment, run, variables, path = opened(args, overrides)
        evaluations = dict(experiment.evaluations)
        if not evaluations:
            raise ValueError(f"{args.config} has no evaluations")
        if args.only:
            evaluations = {args.only: choose(evaluations, args.only, "--only")}
        results = {}
        with entered(experiment.mesh):
            for name, evaluation in evaluations.items():
                values = evaluator_run(evaluation, experiment.mesh)(variables, jax.random.key(experiment.seed))
                results |= {f"{name}/{k}": v for k, v in values.items()}
        if processes.index():
            return 0
        print(
            cli.table(
                Table(f"{path}, step {run.saved.step}", ("name", "value"), [(k, cli.shown(v)) for k, v in results.items()])
            )
        )
        line = {"step": run.saved.step, "stage": run.saved.stage, "overrides": overrides, **plain_config(results)}
        with open(path / "evaluations.jsonl", "a") as out:
            out.write(json.dumps(line) + "\n")
        return 0
    return cli.FAILED


if __name__ == "__main__":
    sys.exit(main())
