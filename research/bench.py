"""`gnomon bench NAME`: runs benchmarks/NAME.py, ours beside its peer in one run, and keeps the result.

Peers live in an environment of their own, .venv-peers, which is made on first use.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from research import cli
from research.core.config import REPO
from research.core.names import suggestion
from research.core.workdir import versions
from research.experiment import Table

FOLDER = REPO / "benchmarks"
PEERS = REPO / ".venv-peers"


def names() -> list[str]:
    return sorted(p.stem for p in FOLDER.glob("*.py") if "NEEDS_PEERS" in p.read_text() and p.stem != "harness")


def needs_peers(path: Path) -> bool:
    """The value of a benchmark's NEEDS_PEERS, read without running it: it may import what is not installed here."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "NEEDS_PEERS":
            return bool(ast.literal_eval(node.value))
    raise ValueError(f"{path} does not say NEEDS_PEERS = True or False")


def ratios(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Each side's median with its range, and how many times as fast ours is as the peer: above 1, ours is faster."""
    out = []
    for row in rows:
        if "sides" not in row:
            continue
        (ours, mine), *others = row["sides"].items()
        for i, (name, side) in enumerate([(ours, mine), *others]):
            speed = f"{side['median'] / mine['median']:.2f}x" if i else ""
            spread = f"{side['median'] * 1e3:.2f} ({side['min'] * 1e3:.2f} to {side['max'] * 1e3:.2f})"
            out.append((row["work"] if not i else "", name, spread, f"{side['first_call']:.2f}", speed))
    return Table("Benchmark", ("work", "side", "median ms (range)", "first call s", "ours is faster by"), out)


def facts(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What rows say beside the sides that were timed: counts, sizes, slopes."""
    out = []
    for row in rows:
        for i, (side, found) in enumerate(row.get("facts", {}).items()):
            for j, (name, value) in enumerate(found.items()):
                out.append(("" if i or j else row["work"], "" if j else side, name, str(value)))
    return Table("Findings", ("work", "side", "what", "value"), out)


def parser() -> argparse.ArgumentParser:
    p = cli.parser(
        "bench", "Time ours beside its peer, both in one run. Appends to benchmarks/results.jsonl.", "transformer_step"
    )
    p.add_argument("name", help=f"one of: {', '.join(names())}")
    p.add_argument("--dry-run", action="store_true", help="print the table without keeping it")
    p.epilog = (
        f"{p.epilog}\n  gnomon bench optimizers -- --work gru      after --, a benchmark's own options, where it has some"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    args, own = parser().parse_args(words[:split]), words[split + 1 :]
    with cli.one_line_errors("bench"):
        if args.name not in names():
            raise ValueError(f"no benchmark {args.name!r}; allowed: {', '.join(names())}{suggestion(args.name, names())}")
        script = FOLDER / f"{args.name}.py"
        python = peers_python() if needs_peers(script) else sys.executable
        rows = measured(python, script, own)
        for shown in (ratios(rows), facts(rows)):
            if shown.rows:
                print(cli.table(shown))
        if not args.dry_run:
            keep(args.name, rows)
        return 0
    return cli.FAILED


def peers_python() -> str:
    """The interpreter of .venv-peers, which is made if need be."""
    if subprocess.run(["sh", str(REPO / "scripts" / "setup"), "peers"], cwd=REPO, check=False).returncode:
        raise ValueError(".venv-peers could not be made; `make .venv-peers` shows why")
    return str(PEERS / "bin" / "python")


def measured(python: str, script: Path, options: Sequence[str]) -> list[dict[str, Any]]:
    """The rows that a benchmark gives, run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        # threads of OpenBLAS wait busily beside XLA's: with another job on the machine, QR took 30 times as long for them
        defaults = {"OPENBLAS_NUM_THREADS": "1", "JAX_PLATFORMS": ""}
        environment = {**defaults, **os.environ, "PYTHONPATH": str(REPO)}
        done = subprocess.run([python, str(script), "--json", str(path), *options], cwd=REPO, env=environment, check=False)
        if done.returncode:
            raise ValueError(f"{script.name} ended with code {done.returncode}; nothing was kept")
        return json.loads(path.read_text())


def keep(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends a line a row to benchmarks/results.jsonl."""
    ran = {k: v for k, v in versions().items() if k not in ("command", "earlier")}
    with open(FOLDER / "results.jsonl", "a") as out:
        for row in rows:
            line = {"benchmark": name, "date": time.strftime("%Y-%m-%d"), **row, "ran_on": ran}
            out.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    sys.exit(main())
