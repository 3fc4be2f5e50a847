"""`gnomon sample --config C [--workdir W]`: draws from a trained run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import jax

from research import cli
from research.core.config import parse_overrides
from research.trained import opened


def parser() -> argparse.ArgumentParser:
    p = cli.parser(
        "sample",
        "Draw from a trained run. What is drawn is set by the config: --config.sample.prompt, .tokens, .temperature, .top_k.",
        "--config configs/lm/stdlib.py:smoke --count 2 --config.sample.prompt='class '",
    )
    cli.trained_run(p)
    p.add_argument("--count", type=int, default=1, metavar="N", help="how many samples (default: 1)")
    p.add_argument("--seed", type=int, default=0, help="other seeds draw other samples (default: 0)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args, rest = parser().parse_known_args(argv)
    with cli.one_line_errors("sample"):
        if args.count < 1:
            raise ValueError(f"--count {args.count}: 1 or more are wanted")
        experiment, _, variables, path = opened(args, parse_overrides(rest))
        if experiment.sample is None:
            raise ValueError(f"{path}: its task has nothing to sample; allowed: a language model")
        for text in experiment.sample(variables, jax.random.key(args.seed), args.count):
            print(text)
            print("-" * 80)
        return 0
    return cli.FAILED


if __name__ == "__main__":
    sys.exit(main())
