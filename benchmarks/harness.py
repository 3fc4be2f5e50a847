"""Timing two sides fairly: interleaved, warm, threads pinned equal, equal outputs checked before.

A benchmark is a file here with `NEEDS_PEERS` (whether it wants the packages of requirements/peers.txt) and `main() -> list of
rows`, each as `compare` gives them. `gnomon bench NAME` runs it, prints the ratios and keeps them in results.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of one call, which must have finished its work when it returns."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def compare(
    work: str, sides: dict[str, Callable[[], Any]], rounds: int = 10, warm_up: int = 2, pause: float = 0.0
) -> dict[str, Any]:
    """A row: each side's median, min and max seconds over `rounds` interleaved calls, after `warm_up` calls and a compilation
    that are timed apart. The first side is ours. pause: seconds before each call that is timed, for threads of the side before
    to fall asleep."""
    row: dict[str, Any] = {"work": work, "rounds": rounds, "sides": {}}
    print(f"{time.strftime('%X')} {work}: {', '.join(sides)}", file=sys.stderr, flush=True)
    first = {name: seconds(call) for name, call in sides.items()}
    for _ in range(warm_up):
        for call in sides.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            time.sleep(pause)
            times[name].append(seconds(call))
    for name, taken in times.items():
        row["sides"][name] = {
            "median": statistics.median(taken),
            "min": min(taken),
            "max": max(taken),
            "first_call": first[name],
        }
    return row


def run(main: Callable[..., list[dict[str, Any]]], parser: argparse.ArgumentParser | None = None) -> None:
    """The entry point of a benchmark: writes its rows where `gnomon bench` wants them, or prints them. `main` takes what the
    benchmark's own parser has, which `gnomon bench NAME -- …` passes on."""
    parser = parser or argparse.ArgumentParser()
    parser.add_argument("--json", help="file for the rows")
    given = vars(parser.parse_args())
    path = given.pop("json")
    text = json.dumps(main(**given))
    if path:
        with open(path, "w") as out:
            out.write(text)
    else:
        print(text)
