"""The results as text: a line a case as it goes, and a table at the end."""

from __future__ import annotations

from collections.abc import Sequence

from pallas_kernels.aot import results
from pallas_kernels.aot.results import Call, Result

HEADER = ("kernel", "case", "target", "verdict", "of which", "memory", "regs", "spilled", "bundles/step", "of", "busiest", "s")
LEGEND = """\
memory: bytes of VMEM scoped to the kernel (TPU), of shared memory a block (GPU). regs, spilled: registers, and bytes of spill
stores, a thread (GPU, ptxas -v); spill stores of vector registers in the whole kernel (TPU). bundles/step: VLIW bundles in the
compiler's final schedule of a grid step that computes, and of one in which every part is run; a range where parts may exclude
each other; + where an inner loop of unknown length counts once. A static count, not a time: stalls and DMA waits are not in it.
busiest: the unit whose slots in these bundles are used most, and the share used. s: seconds to lower and compile."""


def cells(call: Call) -> tuple[str, ...]:
    """memory … busiest"""
    memory = f"{call.memory:,}" if call.memory is not None else "?"
    if call.counts is None:
        return memory, f"{call.registers}", f"{call.spills}", "", "", ""
    c = call.counts
    plus = "" if c.exact else "+"
    working = f"{c.working:,}" if c.one_path == c.working else f"{c.one_path:,} to {c.working:,}"
    return memory, "", f"{c.spills}", working + plus, f"{c.step:,}{plus}", f"{c.unit} {c.share:.0%}"


def table(rows: Sequence[Result]) -> str:
    lines = [HEADER]
    for row in rows:
        seconds = f"{row.seconds:.1f}" if row.seconds is not None else ""
        first = (row.kernel, row.case, row.target, row.verdict)
        for i, call in enumerate(row.calls):
            lines.append(((*first,) if not i else ("", "", "", "")) + (call.name, *cells(call), seconds if not i else ""))
        if not row.calls:
            lines.append((*first, *[""] * 7, seconds))
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    rule = tuple("-" * width for width in widths)
    left = HEADER.index("memory")

    def aligned(line: Sequence[str]) -> str:
        words = [cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))]
        return "  ".join(words).rstrip()

    return "\n".join(map(aligned, [lines[0], rule, *lines[1:]]))


def reasons(rows: Sequence[Result]) -> list[str]:
    """A line for each reason why something was not compiled or not as it should be, and each remark of ptxas, with where."""
    said: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        lines = [f"{row.verdict}: {row.reason}"] if row.reason else []
        lines += [f"note: {call.name}: {note}" for call in row.calls for note in call.notes]
        for line in lines:
            said.setdefault(line, {}).setdefault(f"{row.kernel}, {row.case}", []).append(row.target)

    def where(cases: dict[str, list[str]]) -> str:
        return "; ".join(f"{case} ({', '.join(dict.fromkeys(targets))})" for case, targets in cases.items())

    return [f"{line} -- {where(cases)}" for line, cases in said.items()]


def live(row: Result, number: int, total: int) -> str:
    """The line that tells of a case when it is done."""
    seconds = f", {row.seconds:.1f} s" if row.seconds is not None else ""
    reason = f": {row.reason}" if row.reason else ""
    return f"[{number}/{total}] {row.target:5s} {row.kernel}, {row.case}: {row.verdict}{seconds}{reason}"


def summary(rows: Sequence[Result]) -> str:
    words = {results.COMPILED: "compiled", results.UNSUPPORTED: "declared unsupported", results.FAILED: "failed"}
    return ", ".join(f"{sum(row.verdict == verdict for row in rows)} {word}" for verdict, word in words.items())
