"""Who works on what in a ring: which pieces of a sequence a device has, which of them see one another, and what is left out.

All of it follows from the mask, the length and the number of devices, before anything compiles.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import numpy as np

from pallas_kernels.attention.algebra import Mask
from pallas_kernels.attention.patterns import Everything
from pallas_kernels.attention.shifted import bounds_of_all, shifted, simplified

MOST_CASES = 16  # programs of pieces whose places are known; above, the place of the queries is data
NOTHING, SOME, ALL = 0, 1, 2  # of the pairs of two pieces are seen
WORK = np.array([0.0, 0.5, 1.0])  # that they are, of a piece that is seen in full


class Case(NamedTuple):
    """What a piece of queries sees of a piece of keys. placed: whether the mask counts queries and keys each from their piece's
    first; if not, it counts both from the first key."""

    mask: Mask
    placed: bool


class Plan(NamedTuple):
    """chunks: int [devices, pieces of each], in the order in which a device holds them, of equal sizes. table: int32 [chunks,
    chunks], 0 where the queries of a row's chunk see no key of a column's, else 1 + the index of its case. first, steps: device
    i comes by the keys of devices i - first, i - first - 1, …, `steps` of them."""

    chunks: np.ndarray
    cases: tuple[Case, ...]
    table: np.ndarray
    first: int
    steps: int

    @property
    def zigzag(self) -> bool:
        return self.chunks.shape[1] == 2

    def visits(self) -> np.ndarray:
        """int [steps, devices, pieces of queries, pieces of keys]: entries of `table`, as they are come by."""
        return visited(self.table, self.chunks)[(self.first + np.arange(self.steps)) % len(self.chunks)]


def contiguous(devices: int) -> np.ndarray:
    return np.arange(devices)[:, None]


def zigzag(devices: int) -> np.ndarray:
    """Device i has chunks i and 2n - 1 - i (Llama 3: Grattafiori et al. 2024, arXiv 2407.21783, section 3.3.2)."""
    return np.stack([np.arange(devices), 2 * devices - 1 - np.arange(devices)], axis=-1)


def visited(table: np.ndarray, chunks: np.ndarray) -> np.ndarray:
    """[devices, devices, pieces, pieces]: at step r of a ring from its own keys on, what device i looks up."""
    devices = len(chunks)
    step, device = np.indices((devices, devices))
    keys = chunks[(device - step) % devices]
    return table[chunks[device][:, :, :, None], keys[:, :, None, :]]


def kinds(mask: Mask, length: int, chunks: int) -> np.ndarray:
    """int [chunks, chunks]: NOTHING, SOME or ALL, by the mask's bounds."""
    size = length // chunks
    first = np.arange(chunks) * size
    q_first, kv_first = first[:, None], first[None]
    some, every = bounds_of_all(mask, q_first, q_first + size - 1, kv_first, kv_first + size - 1)
    return np.broadcast_to(np.where(some, np.where(every, ALL, SOME), NOTHING), (chunks, chunks))


def slowest(kind: np.ndarray, chunks: np.ndarray) -> float:
    """The work of all steps, where each takes as long as the device that has most to do."""
    return float(WORK[visited(kind, chunks)].sum((2, 3)).max(1).sum())


@functools.lru_cache(maxsize=256)
def plan(mask: Mask, length: int, devices: int) -> Plan:
    """For sequences of `length`, a multiple of `devices`. Zigzag where that has less to wait for than contiguous pieces, and
    pieces divide in two."""
    chunks = contiguous(devices)
    if length % (2 * devices) == 0:
        kind = kinds(mask, length, 2 * devices)
        if slowest(kind, zigzag(devices)) < slowest(kind, np.arange(2 * devices).reshape(devices, 2)):
            chunks = zigzag(devices)
    return planned(mask, length, chunks)


def planned(mask: Mask, length: int, chunks: np.ndarray) -> Plan:
    """The plan for pieces that are chosen."""
    cases, table = _cases(mask, length, kinds(mask, length, chunks.size))
    needed = (visited(table, chunks) > 0).any((1, 2, 3))
    return Plan(chunks, cases, table, *_span(needed))


def _cases(mask: Mask, length: int, kind: np.ndarray) -> tuple[tuple[Case, ...], np.ndarray]:
    """(cases, table). Where there would be many cases, the fewer of two ways: by both pieces, or by the piece of keys alone."""
    size = length // len(kind)
    pairs = list(zip(*np.nonzero(kind)))

    def seen(a: int, b: int) -> Mask:
        whole = kind[a, b] == ALL
        return Everything() if whole else simplified(shifted(mask, a * size, b * size), size, size)

    placed = [Case(seen(int(a), int(b)), True) for a, b in pairs]
    if len(set(placed)) > MOST_CASES:
        loose = [Case(shifted(mask, int(b) * size, int(b) * size), False) for _, b in pairs]
        placed = min(placed, loose, key=lambda cases: len(set(cases)))
    cases = tuple(dict.fromkeys(placed))
    table = np.zeros(kind.shape, np.int32)
    for (a, b), case in zip(pairs, placed):
        table[a, b] = 1 + cases.index(case)
    return cases, table


def _span(needed: np.ndarray) -> tuple[int, int]:
    """(first, how many): the shortest run of steps around the ring with all that are needed."""
    n = len(needed)
    runs = [(first, steps) for steps, first in itertools.product(range(n + 1), range(n))]
    return next((f, s) for f, s in runs if needed.sum() == needed[(f + np.arange(s)) % n].sum())
