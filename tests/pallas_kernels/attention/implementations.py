"""Which implementations are checked here, on this machine, and on what. A kernel that runs interpreted joins by one line."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest

from tests.pallas_kernels.attention.cases import CASES, Case

# Cases whose like is among the others, as far as implementations go: they differ in masks, which other tests look at.
ALIKE = (
    "window to both sides", "window without end", "block window", "documents of one list, mixed", "dilated", "strided",
    "global tokens", "first tokens global", "random blocks by head", "by head and document", "complement", "blocks",
    "segments mixed", "selected", "129 and 127", "fewer queries", "alibi",
)  # fmt: skip
FEW = ("causal", "by head", "fewer keys, nothing seen", "everything", "traced offsets", "selected by key head")


class Checked(NamedTuple):
    """cases: the names of those that are run (those that are ALIKE in slow tests). adapted: a case as the implementation can
    take it, with other blocks, say. context: what a call is made in, an interpreter. properties: whether what JAX does to
    functions is checked too."""

    cases: Iterable[str] = tuple(CASES)
    adapted: Callable[[Case], Case] = lambda case: case
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    properties: bool = True


REFERENCE = Checked()  # the reference itself, held against the oracle
CHECKED: dict[str, Checked] = {"xla": Checked()}

ALL = ("reference", *CHECKED)


def of(implementation: str) -> Checked:
    return CHECKED.get(implementation, REFERENCE)


with_properties = pytest.mark.parametrize("implementation", ["reference", *(n for n, c in CHECKED.items() if c.properties)])
