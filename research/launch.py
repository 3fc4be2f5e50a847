"""`gnomon launch --processes N --devices M -- train --config C …`: an ordinary verb in several processes.

On this machine by default; `--engine slurm` and `--engine jobset` write what a cluster is to be given instead.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from research import cli
from research.core.names import choose
from research.local_processes import Job

VERBS = {"train": True, "evaluate": True}


def parser() -> argparse.ArgumentParser:
    p = cli.Parser(
        prog="gnomon launch",
        description="Run a verb in several processes, whose devices make up one mesh.",
        usage="gnomon launch [options] -- VERB [options of the verb]",
        epilog="example:\n  gnomon launch --processes 2 --devices 4 -- train --config configs/lm/stdlib.py:smoke "
        "--config.mesh.fsdp=8",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--processes", type=int, default=2, metavar="N", help="how many processes (default: 2)")
    p.add_argument("--devices", type=int, default=1, metavar="M", help="simulated CPU devices of each (default: 1)")
    p.add_argument(
        "--heartbeat", type=int, default=100, metavar="S", help="seconds after which a silent process is lost (default: 100)"
    )
    p.add_argument("--restarts", type=int, default=3, metavar="R", help="times to start again after a crash (default: 3)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    args, verb = parser().parse_args(words[:split]), words[split + 1 :]
    with cli.one_line_errors("launch"):
        if not verb:
            raise ValueError(f"no verb to launch; allowed: -- and one of {', '.join(VERBS)}, with its options")
        choose(VERBS, verb[0], "verb")
        for name, least in (("processes", 1), ("devices", 1), ("heartbeat", 1), ("restarts", 0)):
            if getattr(args, name) < least:
                raise ValueError(f"--{name} {getattr(args, name)}; allowed: {least} or more")
        command = [sys.executable, "-m", f"research.{verb[0]}", *verb[1:]]
        return Job(command, args.processes, args.devices, args.heartbeat, args.restarts).run()
    return cli.FAILED


if __name__ == "__main__":
    sys.exit(main())
