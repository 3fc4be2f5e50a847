"""`make aot`: compiles every case for every target and prints one table. `--help` lists what can be chosen.

Exit code 0: everything compiled but what is declared unsupported. 1: something did not. 2: the arguments ask for nothing.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

from pallas_kernels import cases
from pallas_kernels.aot import pool, results, table, targets
from pallas_kernels.aot.results import Result
from pallas_kernels.aot.targets import Target
from pallas_kernels.cases import Case

Pair = tuple[str, Case]  # the module that lists it, and the case


class Parser(argparse.ArgumentParser):
    """One that refuses in one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def parser() -> Parser:
    names = ",".join(target.name for target in targets.TARGETS)
    p = Parser(prog="aot", description="Compile every case of every kernel for accelerators that are not here.")
    p.add_argument("--targets", metavar="NAMES", help=f"only these of {names}")
    p.add_argument("--only", metavar="PATTERN", action="append", help='only cases like "causal*", or kernels; may be repeated')
    p.add_argument("--quick", action="store_true", help=f"only the targets {', '.join(targets.QUICK)}")
    p.add_argument("--json", metavar="PATH", type=Path, help="also write the results there")
    p.add_argument("--timeout", metavar="S", type=float, default=300, help="seconds that one case may take (300)")
    p.add_argument("--jobs", metavar="N", type=int, default=len(os.sched_getaffinity(0)), help="targets at a time (one a core)")
    p.add_argument("--cases", metavar="MODULES", help="modules with CASES, instead of the kernels' own")
    p.add_argument("--list", action="store_true", help="list what would be compiled, and stop")
    return p


def checked(found: Sequence[Pair]) -> None:
    """Raises ValueError where a case is for no target, or declares something for one that there is not."""
    for module, case in found:
        own = [target.name for target in targets.TARGETS if target.implementation == case.implementation]
        if not own:
            raise ValueError(f"{module}: case {case.name!r} is for {case.implementation!r}; allowed: tpu, gpu")
        for name in [*case.unsupported, *case.spills]:
            if name != "*" and name not in own:
                raise ValueError(f"{module}: case {case.name!r} declares something for {name!r}; allowed: *, {', '.join(own)}")


def chosen(found: Sequence[Pair], patterns: Sequence[str] | None, wanted: Sequence[Target]) -> list[tuple[str, Case, Target]]:
    """What to compile, by target. Raises ValueError for a pattern that nothing is like, or where nothing is left."""

    def like(case: Case, pattern: str) -> bool:
        names = (case.name, case.kernel, f"{case.kernel} {case.name}")
        return any(fnmatch.fnmatchcase(name.lower(), pattern.lower()) for name in names)

    for pattern in patterns or []:
        if not any(like(case, pattern) for _, case in found):
            known = ", ".join(dict.fromkeys(case.name for _, case in found))
            raise ValueError(f"no case is like {pattern!r}; there are: {known if len(known) < 300 else known[:300] + '…'}")
    cases_left = [(m, case) for m, case in found if patterns is None or any(like(case, pattern) for pattern in patterns)]
    result = [(m, case, t) for t in wanted for m, case in cases_left if case.implementation == t.implementation]
    if not result:
        raise ValueError(f"none of these cases is for {', '.join(target.name for target in wanted)}")
    return result


def compiled(module: str, case: Case, target: Target, worker: pool.Worker) -> Result:
    reason = results.declared(case.unsupported, target.name)
    if reason is not None:
        return results.row(case, target, results.UNSUPPORTED, reason)
    try:
        return results.from_json(worker.ask({"module": module, "kernel": case.kernel, "name": case.name}))
    except pool.WorkerError as error:
        return results.row(case, target, results.FAILED, str(error))


def run(todo: Sequence[tuple[str, Case, Target]], jobs: int, timeout: float) -> tuple[list[Result], dict[str, str]]:
    """Every result, in the order of `todo`, and the versions of the compilers. Tells of each case as it is done."""
    workers = {target: pool.Worker(target, timeout) for _, _, target in todo}
    turn, done, stop = threading.Lock(), [0], threading.Event()

    def one_target(target: Target) -> list[Result]:
        rows = []
        for module, case, of in todo:
            if of != target or stop.is_set():
                continue
            rows.append(compiled(module, case, target, workers[target]))
            with turn:
                done[0] += 1
                print(table.live(rows[-1], done[0], len(todo)), flush=True)
        workers[target].end()
        return rows

    with ThreadPoolExecutor(max(1, jobs)) as executor:
        try:
            rows = [row for some in executor.map(one_target, workers) for row in some]
        finally:  # an interruption ends the compilers too
            stop.set()
            for worker in workers.values():
                worker.end()
    versions: dict[str, str] = {}
    for worker in workers.values():
        versions.update(worker.versions)
    return rows, versions


def by_case(rows: Sequence[Result], found: Sequence[Pair]) -> list[Result]:
    order = {(case.kernel, case.name): i for i, (_, case) in enumerate(found)}
    return sorted(rows, key=lambda row: order[row.kernel, row.case])


def report(rows: Sequence[Result], versions: Mapping[str, str]) -> None:
    print(f"\n{table.table(rows)}\n\n{table.LEGEND}\n")
    print("\n".join([*table.reasons(rows), ""]))
    print(", ".join(f"{name} {version}" for name, version in sorted(versions.items())))
    print(table.summary(rows))


def main(argv: Sequence[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    try:
        if args.quick and args.targets:
            raise ValueError("--quick chooses targets, and so does --targets: give one of them")
        names = args.targets.split(",") if args.targets else targets.QUICK if args.quick else [t.name for t in targets.TARGETS]
        wanted = targets.named([name.strip() for name in names])
        found = cases.load(args.cases.split(",") if args.cases else ())
        checked(found)
        todo = chosen(found, args.only, wanted)
        for implementation in {target.implementation for _, _, target in todo}:
            pool.python(implementation)
        if args.json and not args.json.resolve().parent.is_dir():
            raise ValueError(f"--json: there is no folder {args.json.resolve().parent}")
    except (ValueError, ImportError, pool.WorkerError) as error:
        p.error(" ".join(str(error).split()))
    if args.list:
        print("\n".join(f"{target.name:5s} {case.kernel}, {case.name}" for _, case, target in todo))
        return 0
    rows, versions = run(todo, args.jobs, args.timeout)
    rows = by_case(rows, found)
    report(rows, versions)
    if args.json:
        kept = {"versions": versions, "results": [results.as_json(row) for row in rows]}
        args.json.write_text(json.dumps(kept, indent=1) + "\n")
    return 1 if any(row.verdict == results.FAILED for row in rows) else 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is run here, and the compilers' plugins are left alone
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("aot: interrupted", file=sys.stderr)
        sys.exit(130)
