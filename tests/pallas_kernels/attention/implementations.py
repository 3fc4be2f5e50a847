"""Which implementations are checked here, on this machine, and on what. A kernel that runs interpreted joins by one line."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter  # what the races are told by
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import api, gpu, tpu
from pallas_kernels.attention.block_mask import inner
from tests.pallas_kernels.attention.cases import Case, mask_of

# Cases whose like is among the others, as far as implementations go: they differ in masks, which other tests look at.
ALIKE = (
    "window to both sides", "window without end", "block window", "documents of one list, mixed", "dilated", "strided",
    "global tokens", "first tokens global", "random blocks by head", "by head and document", "complement", "blocks",
    "segments mixed", "selected", "129 and 127", "fewer queries", "alibi",
)  # fmt: skip
# Cases that differ from others in how things meet: `make test` looks at the others.
COMBINED = (
    "prefix", "documents", "many global tokens", "bigbird", "function of all", "segments of other keys", "traced offset",
    "traced offset, by head and document", "other values", "selected by key head", "selected, segments and sinks",
)  # fmt: skip


class Checked(NamedTuple):
    """adapted: a case as the implementation can take it. context: what a call is made in, an interpreter. kernel: whether it is
    interpreted, which is slow, so that its tests here are; what is quick stands beside its other tests. properties: whether
    what JAX does to functions is checked here too."""

    adapted: Callable[[Case], Case] = lambda case: case
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    kernel: bool = False
    properties: bool = True


def for_kernels(case: Case) -> Case:
    """A score_mod there closes over no arrays, and masks that hold arrays have lists that are known."""
    if case.mod == "learned":
        case = case._replace(mod="alibi")
    if not inner(mask_of(case)).analytic:
        case = case._replace(traced=False, offset=case.offset[:1], segments=None)
    return case


def for_tpu(case: Case) -> Case:
    """Its race detector holds each access against all before it, so that time grows with their square: fewer heads and
    sequences where they are alike."""
    case = for_kernels(case)
    mask = inner(mask_of(case))
    if case.mask[0] == "selected" or mask.heads:
        return case
    case = case._replace(q_heads=2, kv_heads=max(1, case.kv_heads // 2))
    return case if mask.batch or case.segments or len(case.offset) > 1 else case._replace(batch=1)


def for_gpu(case: Case) -> Case:
    """Its products take 16 rows at least, and so do its blocks."""
    case = for_kernels(case)
    return case if case.blocks is None else case._replace(blocks=(max(case.blocks[0], 16), max(case.blocks[1], 16)))


# Memory that nobody wrote is NaN, and a read out of bounds an error. Copies get their entry of the race detector's clocks by
# lot: with the two that it has by default, two copies always seem ordered.
TPU = pltpu.InterpretParams(
    uninitialized_memory="nan", out_of_bounds_reads="raise", detect_races=True, vector_clock_size=64
)  # fmt: skip


@contextlib.contextmanager
def watched() -> Iterator[list[Any]]:
    """What the race detector found, a state a kernel: the interpreter forgets one's when the next starts. Raises AssertionError
    at the end if any kernel raced."""
    found: list[Any] = []
    make = interpreter.RaceDetectionState

    def kept(*args: Any, **kwargs: Any) -> Any:
        found.append(make(*args, **kwargs))
        return found[-1]

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(interpreter, "RaceDetectionState", kept)
            yield found
        assert not any(state.races_found for state in found), "a kernel raced"
    finally:
        pltpu.reset_tpu_interpret_mode_state()


@contextlib.contextmanager
def on_tpu() -> Iterator[None]:
    with watched() as kernels, pytest.MonkeyPatch.context() as patch:
        patch.setitem(api.IMPLEMENTATIONS, "tpu", functools.partial(tpu.attend, interpret=TPU))
        yield
        assert kernels, "no kernel was watched"


@contextlib.contextmanager
def on_gpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(api.IMPLEMENTATIONS, "gpu", functools.partial(gpu.attend, interpret=True))
        yield


REFERENCE = Checked()  # the reference itself, held against the oracle
CHECKED: dict[str, Checked] = {
    "xla": Checked(),
    "tpu": Checked(for_tpu, on_tpu, kernel=True, properties=False),
    "gpu": Checked(for_gpu, on_gpu, kernel=True, properties=False),
}
KERNELS = [name for name, checked in CHECKED.items() if checked.kernel]


def slow(name: str) -> Any:
    return pytest.mark.slow if name in KERNELS else ()


EACH = [pytest.param(name, marks=slow(name)) for name in CHECKED]
ALL = ["reference", *EACH]


def of(implementation: str) -> Checked:
    return CHECKED.get(implementation, REFERENCE)


with_properties = pytest.mark.parametrize("implementation", ["reference", *(n for n, c in CHECKED.items() if c.properties)])
