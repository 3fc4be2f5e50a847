"""Static counts of kernels side by side, for benchmarks: what the TPU compiler's schedules have in them. They are no times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pallas_kernels.aot import pool, results, targets
from pallas_kernels.aot.results import Call


class Entry(NamedTuple):
    """A function by its name, "module:function", which, called with `arguments` (what JSON can hold), gives (function to jit,
    its arguments' ShapeDtypeStructs). It is imported where the compiler is, in .venv-tpu, with the repository on its path."""

    function: str
    arguments: Mapping[str, Any] = {}


def static_counts(target: str, sides: Mapping[str, Entry], timeout: float = 300) -> dict[str, tuple[Call, ...]]:
    """Compiles each side for one TPU target and gives, for each Pallas kernel in it, its VMEM bytes and `results.Counts`.

    Two kernels' grid steps do unlike amounts of work: divide `counts.working` by what a step computes, such as the pairs of its
    block, and multiply by the steps that compute, before one is set beside the other. Raises RuntimeError where one does not
    compile, pool.WorkerError where there is no compiler.
    """
    (wanted,) = targets.named([target])
    if wanted.implementation != "tpu":
        raise ValueError(f"{wanted.name} is no TPU; bundles are counted for TPUs only")
    worker = pool.Worker(wanted, timeout)
    found = {}
    try:
        for name, entry in sides.items():
            result = results.from_json(worker.ask({"entry": entry.function, "arguments": dict(entry.arguments)}))
            if result.verdict != results.COMPILED:
                raise RuntimeError(f"{name} does not compile for {wanted.name}: {result.reason}")
            found[name] = result.calls
    finally:
        worker.end()
    return found
