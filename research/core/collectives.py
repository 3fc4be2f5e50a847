"""What a compiled program says between devices: the collectives in its text, how often each runs, and what it moves.

Static counts, read from XLA's optimized HLO: no times.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
          "u64": 8, "f64": 8, "c64": 8, "c128": 16}  # fmt: skip
_BEGINS = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r" = (?P<type>\(.*?\)|\S+) (?P<op>[\w\-]+)\(")
_CALLED = re.compile(r"(?:to_apply|calls|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_RUNS = ("while", "call", "conditional", "async-start")  # instructions that run computations with collectives in them
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_WHERE = re.compile(r'op_name="([^"]*)"')


class Collective(NamedTuple):
    """One collective instruction. times: how often it runs in one call of the program; within a loop whose length the compiler
    does not know, as if that ran once. bytes: of its result on one device, in one run. where: the operation that it came from,
    such as "jit(steps)/blocks/0/mlp/up/dot_general"."""

    kind: str
    times: int
    bytes: int
    where: str


class Total(NamedTuple):
    """runs: of collectives in one call of the program. bytes: of all their results on one device."""

    runs: int
    bytes: int


def _bytes(result: str, started: bool) -> int:
    """Of the arrays of a result's type. Of an instruction that only starts it, the type has operands, then results, then
    scalars of its own."""
    arrays = [(dtype, dims) for dtype, dims in _ARRAY.findall(result) if not (started and dtype == "u32" and not dims)]
    arrays = arrays[len(arrays) // 2 :] if started else arrays
    return sum(_BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in arrays)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by its name, and the name of the one that is entered."""
    bodies: dict[str, list[str]] = {}
    entry = current = ""
    for line in text.splitlines():
        if begins := _BEGINS.match(line):
            current = begins[2]
            bodies[current] = []
            entry = current if begins[1] else entry
        elif current:
            bodies[current].append(line)
    return bodies, entry


def collectives(text: str) -> list[Collective]:
    """The collectives in `compiled.as_text()`, one an instruction and place that it is reached from."""
    bodies, entry = _computations(text)

    def walk(name: str, times: int) -> Iterator[Collective]:
        for line in bodies.get(name, ()):
            instruction = _INSTRUCTION.search(line)
            if instruction is None:
                continue
            kind = instruction["op"].removesuffix("-start")
            if kind in KINDS:
                where = _WHERE.search(line)
                started = kind != instruction["op"] and kind != "all-reduce"
                yield Collective(kind, times, _bytes(instruction["type"], started), where[1] if where else "")
            elif instruction["op"] in _RUNS:
                trips = _TRIPS.search(line)
                branches = [n.strip(" %") for group in _BRANCHES.findall(line) for n in group.split(",")]
                for body in [*_CALLED.findall(line), *branches]:
                    yield from walk(body, times * (int(trips[1]) if trips else 1))

    return list(walk(entry, 1))


def totals(found: list[Collective]) -> Mapping[str, Total]:
    """The sums by kind, of the kinds that there are."""
    of = {kind: [c for c in found if c.kind == kind] for kind in KINDS}
    return {kind: Total(sum(c.times for c in mine), sum(c.times * c.bytes for c in mine)) for kind, mine in of.items() if mine}
