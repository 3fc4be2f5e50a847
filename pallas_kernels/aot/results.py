"""What is known of a case compiled for a target, and whether that is as it should be."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from pallas_kernels.aot.targets import Target
from pallas_kernels.cases import Case

LONGEST = 160  # characters of a reason

COMPILED, UNSUPPORTED, FAILED = "compiled", "unsupported", "failed"

T = TypeVar("T")


class Counts(NamedTuple):
    """A static count of the bundles of one TPU kernel, from the compiler's final schedule; bundles.py says how. No time."""

    total: int  # all bundles of the kernel
    passes: int | None  # of the grid's loop: grid steps, and those that fill and drain the pipeline; None: not a constant
    step: int  # a pass of the grid's loop, with every part that a branch may skip
    working: int  # the same without those parts that hold no matrix product
    one_path: int  # of parts beside each other that do, only the longest
    exact: bool  # False: an inner loop of unknown length is among them, its body counted once
    unit: str  # the busiest unit over `working`, such as "MXU" or "VALU"
    share: float  # of its slots that are used
    spills: int  # vector registers stored to VMEM for want of registers: such stores in the whole kernel


class Call(NamedTuple):
    """One Pallas kernel in what was compiled."""

    name: str
    memory: int | None  # bytes of VMEM (TPU) or shared memory (GPU); None: the compiler does not say
    counts: Counts | None = None  # TPU
    registers: int | None = None  # GPU: a thread
    spills: int | None = None  # GPU: bytes of spill stores a thread
    notes: tuple[str, ...] = ()  # GPU: what else ptxas has to say


class Result(NamedTuple):
    """A row of the table."""

    kernel: str
    case: str
    target: str
    verdict: str  # COMPILED, UNSUPPORTED (declared) or FAILED
    reason: str = ""  # why not; one line
    seconds: float | None = None  # lowering and compilation
    calls: tuple[Call, ...] = ()


def declared(table: Mapping[str, T], target: str) -> T | None:
    """The entry of a case's table for a target: its own, or that of "*"."""
    return table.get(target, table.get("*"))


def row(case: Case, target: Target, verdict: str, reason: str = "", seconds: float | None = None, calls=()) -> Result:
    return Result(case.kernel, case.name, target.name, verdict, shortened(reason), seconds, tuple(calls))


def judged(case: Case, target: Target, seconds: float, calls: tuple[Call, ...]) -> Result:
    """The verdict over what a compiler gave."""
    wrong = []
    if not calls:
        wrong.append("compiled, but without any Pallas kernel in it")
    for call in calls:
        if call.memory is not None and call.memory > target.memory:
            kind = "VMEM" if target.implementation == "tpu" else "shared memory a block"
            wrong.append(f"{call.name}: {call.memory:,} bytes of {kind}, {target.memory:,} allowed")
        allowed = declared(case.spills, target.name) or 0
        if call.spills is not None and call.spills > allowed:
            more = f", {allowed} declared" if allowed else ""
            wrong.append(f"{call.name}: {call.spills} bytes of registers spilled{more}")
    return row(case, target, FAILED if wrong else COMPILED, "; ".join(wrong), seconds, calls)


def shortened(reason: str) -> str:
    """One line of a compiler's error: the first that says something, without its decoration."""
    lines = [" ".join(line.split()) for line in reason.splitlines()]
    lines = [line for line in lines if re.search(r"\w", line) and not line.startswith(("Traceback", "File "))] or [""]
    line = re.sub(r"^(?:jax\.errors\.|jaxlib\.\w+\.|jax\._src\.)", "", lines[0])
    if line.endswith(":") and len(lines) > 1:
        line = f"{line} {lines[1]}"
    return line if len(line) <= LONGEST else line[: LONGEST - 1].rstrip() + "…"


def as_json(result: Result) -> dict[str, Any]:
    calls = [call._asdict() | {"counts": call.counts._asdict() if call.counts else None} for call in result.calls]
    return result._asdict() | {"calls": calls}


def from_json(value: Mapping[str, Any]) -> Result:
    def call(found: Mapping[str, Any]) -> Call:
        counts = Counts(**found["counts"]) if found["counts"] else None
        return Call(**{**found, "counts": counts, "notes": tuple(found["notes"])})

    return Result(**{**value, "calls": tuple(map(call, value["calls"]))})
