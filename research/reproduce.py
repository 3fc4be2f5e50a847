"""`gnomon reproduce PAPER`: runs a paper's experiment and sets what came out beside what was published.

A paper is `configs/papers/<paper>/`: config.py, claims.toml, and results.jsonl, to which one line a claim and seed is appended.
A claim says which `arg` of the config gives it, which `metric` of the run's summary it is about, what was `published` and where
(`source`), what we `accept` ({at_most = x}, {at_least = x}, {within = x} of the published value), and every deviation in words.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from research import cli, train
from research.core.config import REPO, config_sha256, load_config, parse_overrides
from research.core.names import suggestion
from research.experiment import Table

PAPERS = REPO / "configs" / "papers"
KEYS = ("name", "arg", "source", "metric", "published", "accept", "deviations")
ACCEPT = ("at_most", "at_least", "within")


class Claim(NamedTuple):
    name: str
    arg: str
    source: str
    metric: str
    published: float
    accept: Mapping[str, float]
    deviations: str

    def met(self, value: float) -> bool:
        """Whether a value, the mean over seeds, is what we accept."""
        (kind, bound), *_ = self.accept.items()
        return {
            "at_most": value <= bound,
            "at_least": value >= bound,
            "within": abs(value - self.published) <= bound,
        }[kind]


def papers() -> list[str]:
    return sorted(p.parent.name for p in PAPERS.glob("*/claims.toml"))


def claims(paper: str) -> list[Claim]:
    """The claims of a paper. ValueError, one line: no such paper, a claim with an unknown or missing key."""
    path = PAPERS / paper / "claims.toml"
    if not path.exists():
        raise ValueError(f"no paper {paper!r}; allowed: {', '.join(papers())}{suggestion(paper, papers())}")
    found = []
    for entry in tomllib.loads(path.read_text())["claim"]:
        wrong = set(entry) ^ set(KEYS)
        if wrong or set(entry["accept"]) - set(ACCEPT) or len(entry["accept"]) != 1:
            raise ValueError(
                f"{path.name}, claim {entry.get('name')!r}: keys are {', '.join(KEYS)}; accept has one of {', '.join(ACCEPT)}"
            )
        found.append(Claim(**entry))
    return found


def results(paper: str) -> list[dict[str, Any]]:
    path = PAPERS / paper / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def newest(claim: Claim, lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The claim's lines by the newest config that was run, the last of each seed."""
    ours = [line for line in lines if line["claim"] == claim.name]
    return list({line["seed"]: line for line in ours if line["config_sha256"] == ours[-1]["config_sha256"]}.values())


def shown(lines: Sequence[Mapping[str, Any]]) -> str:
    """The mean over seeds and its range; of one seed the value, with its 95% interval where the run has measured one."""
    got = np.array([line["value"] for line in lines], float)
    if len(got) == 1:
        return f"{got[0]:.4g}" + (f" +- {lines[0]['interval']:.2g}" if "interval" in lines[0] else "") + " (1 seed)"
    return f"{got.mean():.4g} ({got.min():.4g} to {got.max():.4g}, {len(got)} seeds)"


def table(paper: str) -> Table:
    """Claims of a paper beside what was measured; a missed one stays, marked."""
    rows = []
    lines = results(paper)
    for claim in claims(paper):
        found = newest(claim, lines)
        (kind, bound), *_ = claim.accept.items()
        verdict = ("met" if claim.met(float(np.mean([line["value"] for line in found]))) else "MISSED") if found else ""
        ours = shown(found) if found else "not run"
        rows.append((claim.name, claim.metric, f"{claim.published:g}", ours, f"{kind} {bound:g}", verdict))
    return Table(paper, ("claim", "metric", "published", "ours: mean (range)", "accepted", ""), rows)


def markdown(item: Table) -> str:
    rows = [item.header, ["---"] * len(item.header), *item.rows]
    return "\n".join([f"### {item.title}", "", *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""])


def parser() -> argparse.ArgumentParser:
    p = cli.parser("reproduce", "Run a paper's experiment and set it beside what was published.", "mnist1d")
    p.add_argument("paper", nargs="?", help="a folder of configs/papers")
    p.add_argument("--list", action="store_true", help="show claims and results, running nothing")
    p.add_argument("--markdown", action="store_true", help="with --list: as the docs have it")
    p.add_argument("--only", metavar="ARG", help="only the claims of one argument of the config")
    p.add_argument("--workdir", default="runs/papers", help="where the runs are kept (default: runs/papers)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args, rest = parser().parse_known_args(argv)
    with cli.one_line_errors("reproduce"):
        overrides = parse_overrides(rest)
        if args.list:
            for paper in [args.paper] if args.paper else papers():
                print(markdown(table(paper)) if args.markdown else cli.table(table(paper)))
            return 0
        if not args.paper:
            raise ValueError(f"a paper is wanted; allowed: {', '.join(papers())}")
        todo = claims(args.paper)
        names = list(dict.fromkeys(claim.arg for claim in todo))
        if args.only:
            names = [n for n in names if n == args.only]
            if not names:
                known = sorted({claim.arg for claim in todo})
                raise ValueError(
                    f"--only {args.only}: no such argument; allowed: {', '.join(known)}{suggestion(args.only, known)}"
                )
        for arg in names:
            reproduce(args.paper, arg, [c for c in todo if c.arg == arg], Path(args.workdir), overrides)
        if overrides:
            print(f"not recorded, since the config was changed: {', '.join(f'{k}={v}' for k, v in overrides.items())}")
        else:
            print(cli.table(table(args.paper)))
        return 0
    return cli.FAILED


def reproduce(paper: str, arg: str, todo: Sequence[Claim], runs: Path, overrides: Mapping[str, str]) -> None:
    """Trains one argument of a paper's config, unless that is done, and appends its claims' values, unless they are those of
    another config."""
    name = f"{PAPERS / paper / 'config.py'}:{arg}"
    path = runs / paper / arg
    config = load_config(name, overrides)
    print(f"{paper}:{arg} in {path}")
    code = train.one(train.parser().parse_args(["--config", name]), config, path)
    if code or not (path / "summary.json").exists():
        raise SystemExit(code)
    if overrides:
        return
    append(
        paper, todo, json.loads((path / "summary.json").read_text()), json.loads((path / "versions.json").read_text()), config
    )


def append(paper: str, todo: Sequence[Claim], summary: Mapping[str, Any], versions: Mapping[str, Any], config: Any) -> None:
    """One line a claim and seed in results.jsonl, with the metric's 95% interval where the summary has one; a population's
    members are seeds. The same result is not written twice."""
    run = {
        "commit": (versions["git"] or {}).get("commit"),
        "config_sha256": config_sha256(config),
        "state_sha256": summary["state_sha256"],
        "versions": {k: versions[k] for k in ("python", "jax", "jaxlib", "flax", "optax", "numpy")},
        "device": {"cpu": versions["cpu"]["model"], "cores": versions["cpu"]["cores"], "devices": versions["devices"]},
        "wall_seconds": summary["wall_seconds"],
    }
    known = {(line["claim"], line["seed"], line["state_sha256"], line.get("interval")) for line in results(paper)}
    with open(PAPERS / paper / "results.jsonl", "a") as out:
        for claim in todo:
            found, interval = summary[claim.metric], summary.get(f"{claim.metric}_interval")
            own = {} if isinstance(found, list) or interval is None else {"interval": interval}
            for i, value in enumerate(found if isinstance(found, list) else [found]):
                if (claim.name, config.seed + i, summary["state_sha256"], own.get("interval")) not in known:
                    out.write(json.dumps({"claim": claim.name, "value": value, **own, "seed": config.seed + i, **run}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
