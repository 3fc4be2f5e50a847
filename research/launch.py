"""`gnomon launch --processes N --devices M -- train --config C …`: an ordinary verb in several processes.

On this machine by default; `--engine slurm` and `--engine jobset` write what a cluster is to be given instead.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from research import cli
from research.clusters import jobset, sbatch
from research.core.names import choose
from research.local_processes import Job

VERBS = {"train": True, "evaluate": True}
ENGINES = {"local": "", "slurm": "sbatch takes", "jobset": "kubectl apply -f takes"}
# Of each option the default, and the engines that it means something to; --heartbeat is for all.
OPTIONS = {
    "processes": (2, ("local", "slurm")),
    "devices": (1, ("local",)),
    "restarts": (3, ("local", "jobset")),
    "nodes": (1, ("slurm", "jobset")),
    "time": (60, ("slurm",)),
    "logs": ("runs/slurm", ("slurm",)),
    "name": ("gnomon", ("jobset",)),
    "image": ("gnomon", ("jobset",)),
    "claim": ("runs:/runs", ("jobset",)),
}


def parser() -> argparse.ArgumentParser:
    p = cli.Parser(
        prog="gnomon launch",
        description="Run a verb in several processes, whose devices make up one mesh.",
        usage="gnomon launch [options] -- VERB [options of the verb]",
        epilog="example:\n  gnomon launch --processes 2 --devices 4 -- train --config configs/lm/stdlib.py:smoke "
        "--config.mesh.fsdp=8",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--processes", type=int, metavar="N", help="how many processes; slurm: of each node (default: 2)")
    p.add_argument("--devices", type=int, metavar="M", help="simulated CPU devices of each (default: 1)")
    p.add_argument(
        "--heartbeat", type=int, default=100, metavar="S", help="seconds after which a silent process is lost (default: 100)"
    )
    p.add_argument("--restarts", type=int, metavar="R", help="times to start again after a crash (default: 3)")
    p.add_argument("--engine", choices=ENGINES, default="local", help="where they run (default: this machine)")
    p.add_argument("--dry-run", action="store_true", help="print what is run, or what the cluster is to be given, and stop")
    p.add_argument("--nodes", type=int, metavar="N", help="slurm, jobset: machines (default: 1)")
    p.add_argument("--time", type=int, metavar="MINUTES", help="slurm: the time limit (default: 60)")
    p.add_argument("--logs", metavar="FOLDER", help="slurm: where output goes (default: runs/slurm)")
    p.add_argument("--name", help="jobset: its name (default: gnomon)")
    p.add_argument("--image", help="jobset: an image with the project installed (default: gnomon)")
    p.add_argument("--claim", metavar="NAME:PATH", help="jobset: the volume for runs (default: runs:/runs)")
    return p


def given_to_engine(args: argparse.Namespace) -> None:
    """Puts the defaults in place. Raises ValueError on an option that the engine would do nothing with."""
    for name, (default, engines) in OPTIONS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif args.engine not in engines:
            raise ValueError(
                f"--{name} {getattr(args, name)} means nothing to --engine {args.engine}; allowed with: {', '.join(engines)}"
            )


def given_to_cluster(args: argparse.Namespace, command: Sequence[str]) -> str:
    """The batch script or the manifest; `--processes` are those of one node under SLURM, and JobSet has one a node."""
    if args.engine == "slurm":
        return sbatch(command, args.nodes, args.processes, args.heartbeat, Path(args.logs), args.time)
    return jobset(command, args.name, args.nodes, args.heartbeat, args.restarts, args.image, args.claim)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    if split == len(words) and (bare := [word for word in words if word in VERBS]):
        parser().error(f"-- is missing before {bare[0]}")
    args, verb = parser().parse_args(words[:split]), words[split + 1 :]
    with cli.one_line_errors("launch"):
        if not verb:
            raise ValueError(f"no verb to launch; allowed: -- and one of {', '.join(VERBS)}, with its options")
        choose(VERBS, verb[0], "verb")
        given_to_engine(args)
        for name, least in (("processes", 1), ("devices", 1), ("heartbeat", 1), ("restarts", 0), ("nodes", 1), ("time", 1)):
            if getattr(args, name) < least:
                raise ValueError(f"--{name} {getattr(args, name)}; allowed: {least} or more")
        if args.engine != "local":
            if not args.dry_run:
                raise ValueError(
                    f"--engine {args.engine} submits nothing; allowed: with --dry-run, whose output {ENGINES[args.engine]}"
                )
            print(given_to_cluster(args, ["python", "-m", f"research.{verb[0]}", *verb[1:]]), end="")
            return 0
        command = [sys.executable, "-m", f"research.{verb[0]}", *verb[1:]]
        if args.dry_run:
            print(f"{args.processes} processes of {args.devices} devices: {shlex.join(command)}")
            return 0
        return Job(command, args.processes, args.devices, args.heartbeat, args.restarts).run()
    return cli.FAILED


if __name__ == "__main__":
    sys.exit(main())
