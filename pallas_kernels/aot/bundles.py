"""The static schedule of a TPU kernel, from the files that libtpu dumps (--xla_jf_dump_to, text of the final passes):

    *-NAME-*-final_bundles.txt                                every VLIW bundle, with its address, branches and regions
    *-NAME-*-final_hlo-static-per-bundle-utilization.txt      a line a bundle: slots that it uses of each unit

Bundles are issued one a cycle when nothing stalls; DMA waits, bank conflicts and results not yet ready stall. So a count of
bundles bounds the compute of a pass from below, and is no time.

What is counted. The grid of a `pallas_call` becomes one loop, whose pass also starts and awaits the DMAs of the pipeline. A
loop is found by its branch back; it ends with the branch's delay slots. A branch forward within it skips a part: the work of a
`pl.when`, or a whole step where the pipeline is filled or drained.

    total      all bundles, each once
    passes     of the outermost loop: the steps of the grid, and two or so that fill and drain the pipeline
    step       a pass of the outermost loop (the longest one, where a kernel has several; all bundles where it has none), no
               part skipped. An inner loop counts as often as it runs where its length is a constant, once where it is not
    working    of these, without the parts that hold no matrix product: what is done at the first or last step only, such as
               clearing an accumulator and writing it out. All of `step` where a kernel has no matrix product
    one_path   of these, with only the longest part at each level that has one: where parts exclude each other, as blocks with
               and without a mask do, `working` counts both, and `one_path` the longer
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pallas_kernels.aot.results import Counts

LINE = re.compile(r"^ *(0x[0-9a-f]+|\d+) +(?:(?:LH|LB|LE|PB|PF|CT): |: )")
BRANCH = re.compile(r"sbr\.rel \((!?%\w+)\) target = \$region(\d+)|sbr\.rel target = \$region(\d+)")
REGION = re.compile(r"(?:Start|Start/End empty) region (\d+)")
WHEN = r"(?:\(!?%\w+\), )?"  # an instruction's own predicate
EXIT = re.compile(rf"(%\w+) = scmp\.ge\.s32\.totalorder {WHEN}(%\w+), (\d+) /\* loop exit test \*/")
ADD = re.compile(rf"(%\w+) = sadd\.s32 {WHEN}(\d+), (%\w+)")
PHI = re.compile(r"(%\w+) = sphi (%\w+), ")
MOVE = re.compile(rf"(%\w+) = smov {WHEN}(%?\w+)")
STORE = re.compile(r" = sst \[smem:\[(#\w+_spill)\]\] (%\w+)")
LOAD = re.compile(r"(%\w+) = sld \[smem:\[(#\w+_spill)\]\]")
MATRIX, SPILL = "MXU", "VSTORE:SPILL"


class Span(NamedTuple):
    """Bundles first to last, both included."""

    first: int
    last: int

    def __contains__(self, other: object) -> bool:
        return isinstance(other, Span) and self.first <= other.first and other.last <= self.last


class Schedule(NamedTuple):
    """`loops`: where they are, and how often each runs (None: not a constant). `parts`: what a branch forward may skip."""

    bundles: int
    loops: dict[Span, int | None]
    parts: list[Span]


class Use(NamedTuple):
    """`slots`: of each bundle, those used of each unit, of `capacity`."""

    units: list[str]
    capacity: list[int]
    slots: list[list[int]]


def bundles(text: str) -> Iterator[tuple[int, str]]:
    """(address, text) of every bundle. A bundle may go over several lines."""
    address, lines = None, []
    for line in text.splitlines():
        found = LINE.match(line)
        if found:
            if address is not None:
                yield address, "\n".join(lines)
            address, lines = int(found[1], 16), []
        lines.append(line)
    if address is not None:
        yield address, "\n".join(lines)


def schedule(text: str, delay_slots: int) -> Schedule:
    """Reads final_bundles.txt. `delay_slots`: bundles after a branch that are issued whichever way it goes."""
    starts: dict[int, int] = {}  # of regions
    branches: list[tuple[int, str, int]] = []
    last = -1
    for address, bundle in bundles(text):
        if address != last + 1:
            raise ValueError(f"the dump of the schedule jumps from bundle {last} to {address}")
        last = address
        for number in REGION.findall(bundle):
            starts.setdefault(int(number), address)
        for found in BRANCH.finditer(bundle):
            branches.append((address, (found[1] or "").lstrip("!"), int(found[2] or found[3])))
    passes = lengths(text)
    loops: dict[Span, int | None] = {}
    parts, unknown = [], []
    for address, predicate, region in branches:
        target, end = starts.get(region), min(address + delay_slots, last)
        if target is None:
            unknown.append(Span(address, end))
        elif target <= address:
            loops[Span(target, end)] = passes.get(predicate)
        elif end + 1 < target:
            parts.append(Span(end + 1, target - 1))
    # The dump does not name the region at the very end, where a branch before the loops may go: on v5p, one core's share.
    if any(span in loop for span in unknown for loop in loops):
        raise ValueError("the dump of the schedule lacks a region that a branch in a loop goes to")
    return Schedule(last + 1, loops, parts)


def lengths(text: str) -> dict[str, int]:
    """By the predicate with which a loop is left, the passes of those loops whose start, step and end are constants."""
    adds = {found[1]: (int(found[2]), found[3]) for found in ADD.finditer(text)}
    phis = {found[1]: found[2] for found in PHI.finditer(text)}
    same = {found[1]: found[2] for found in MOVE.finditer(text)}  # a name -> what it is a copy of: a name or a number
    stored: dict[str, set[str]] = {}
    for slot, name in STORE.findall(text):
        stored.setdefault(slot, set()).add(name)
    for name, slot in LOAD.findall(text):
        if len(stored.get(slot, ())) == 1:  # otherwise the slot is used for several values
            same[name] = next(iter(stored[slot]))

    def source(name: str) -> str:
        seen: set[str] = set()
        while name in same and name not in seen:
            seen.add(name)
            name = same[name]
        return name

    found = {}
    for predicate, counter, end in (match.groups() for match in EXIT.finditer(text)):
        step, before = adds.get(source(counter), (0, ""))
        start = source(phis.get(source(before), ""))
        if step and start.isdecimal():
            found[predicate] = -(-(int(end) - int(start)) // step)
    return found


def use(text: str) -> Use:
    """Reads final_hlo-static-per-bundle-utilization.txt."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("==")]
    units, capacity = [name.strip() for name in lines[0].split(",")], [int(n) for n in lines[1].split()]
    slots = [[int(n) for n in line.split()] for line in lines[2:]]
    if MATRIX not in units or any(len(row) != len(units) for row in [capacity, *slots]):
        raise ValueError("the dump of the units' use does not have a column for each unit")
    return Use(units, capacity, slots)


def count(schedule: Schedule, use: Use) -> Counts:
    """The counts named at the top of this module, and the busiest unit over `working`."""
    if len(use.slots) != schedule.bundles:
        raise ValueError(f"the dumps disagree: {schedule.bundles} bundles, the units' use of {len(use.slots)}")
    matrix = use.units.index(MATRIX)

    def multiplies(span: Span) -> bool:
        return any(row[matrix] for row in use.slots[span.first : span.last + 1])

    whole = Span(0, schedule.bundles - 1)
    step = max(outermost(list(schedule.loops)), key=lambda span: span.last - span.first, default=whole)
    weights = [0] * schedule.bundles  # how often a pass of `step` issues each bundle
    weights[step.first : step.last + 1] = [1] * (step.last - step.first + 1)
    inner = [(span, passes) for span, passes in schedule.loops.items() if span in step and span != step]
    for span, passes in inner:
        for i in range(span.first, span.last + 1):
            weights[i] *= 1 if passes is None else passes
    parts = [part for part in schedule.parts if part in step] if multiplies(step) else []

    def bundles_of(skipped: Sequence[Span]) -> list[int]:
        kept = list(weights)
        for span in skipped:
            kept[span.first : span.last + 1] = [0] * (span.last - span.first + 1)
        return kept

    idle = [part for part in parts if not multiplies(part)]
    working = bundles_of(idle)
    lesser = [part for part in parts if part not in idle and not longest(part, parts, working, multiplies)]
    used = [sum(weight * row[u] for weight, row in zip(working, use.slots)) for u in range(len(use.units))]
    shares = [n / (sum(working) * capacity) for n, capacity in zip(used, use.capacity)]
    busiest = max(range(len(shares)), key=shares.__getitem__)
    return Counts(
        total=schedule.bundles,
        passes=schedule.loops.get(step, 1),
        step=sum(weights),
        working=sum(working),
        one_path=sum(bundles_of(idle + lesser)),
        exact=all(passes is not None for _, passes in inner),
        unit=use.units[busiest],
        share=shares[busiest],
        spills=sum(row[use.units.index(SPILL)] for row in use.slots),
    )


def outermost(spans: list[Span]) -> list[Span]:
    return [span for span in spans if not any(span in other and span != other for other in spans)]


def longest(part: Span, parts: Sequence[Span], weights: Sequence[int], multiplies) -> bool:
    """Whether a part is the longest among those beside it: that hold a matrix product, and lie in the same part."""

    def around(span: Span) -> list[Span]:
        return [other for other in parts if span in other and span != other]

    beside = [other for other in parts if multiplies(other) and around(other) == around(part)]
    return part == max(beside, key=lambda span: sum(weights[span.first : span.last + 1]))
