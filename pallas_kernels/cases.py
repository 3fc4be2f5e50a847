"""What the compile matrix (`make aot`) compiles: cases, listed by each kernel in its `shapes.py`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

KERNELS = ("attention",)  # packages here whose shapes.py has CASES

Build = Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]


class Case(NamedTuple):
    """One thing to compile for every target of an implementation.

    kernel, name      what it is called in the table, ("attention", "causal 8k forward"); together they are unique
    implementation    the targets that it is for: "tpu" or "gpu"
    build             gives the function to jit and its arguments, (trees of) jax.ShapeDtypeStruct without a sharding. It is
                      called in the process that compiles, where nothing can be run; the function must hold a Pallas kernel
    unsupported       target, or "*" for all, -> why it is not for that target. Shown in the table, and not compiled
    spills            target, or "*" -> bytes of register spill stores that are put up with there (GPU); the comment beside
                      the entry says why
    """

    kernel: str
    name: str
    implementation: Literal["tpu", "gpu"]
    build: Build
    unsupported: Mapping[str, str] = {}
    spills: Mapping[str, int] = {}


def load(modules: Sequence[str] = ()) -> list[tuple[str, Case]]:
    """Every case with the module that lists it: of the given modules, or of all KERNELS."""
    found: list[tuple[str, Case]] = []
    for module in modules or [f"pallas_kernels.{kernel}.shapes" for kernel in KERNELS]:
        found += [(module, case) for case in importlib.import_module(module).CASES]
    seen: set[tuple[str, str]] = set()
    for module, case in found:
        if (case.kernel, case.name) in seen:
            raise ValueError(f"{module}: there are two cases {case.kernel!r}, {case.name!r}")
        seen.add((case.kernel, case.name))
    return found
