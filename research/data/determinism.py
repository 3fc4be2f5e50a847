"""Hashes and permutations that are the same on every machine, Python and NumPy.

NumPy promises the raw output of its bit generators for ever, but not that of `Generator.permutation` (NEP 19), so orders are
made here from raw output alone.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np


def digest(*parts: Any) -> str:
    """32 hex digits of the sha256 of arrays (dtype, shape and bytes), bytes, and anything else by its `repr`."""
    hashed = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            hashed.update(f"array {part.dtype.str} {part.shape}\n".encode())
            hashed.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
        else:
            content = part if isinstance(part, bytes) else repr(part).encode()
            hashed.update(f"{type(part).__name__} {len(content)}\n".encode())
            hashed.update(content)
    return hashed.hexdigest()[:32]


def mixed(*numbers: int) -> int:
    """A 128-bit number that depends on all of `numbers`, as unrelated for neighbours as for strangers."""
    return int.from_bytes(hashlib.sha256(repr(tuple(int(n) for n in numbers)).encode()).digest()[:16], "little")


def permutation(count: int, *numbers: int) -> np.ndarray:
    """int64 [count], a permutation of range(count) that depends on `numbers` alone. Read-only."""
    keys = np.random.Philox(key=mixed(*numbers)).random_raw(count)
    order = np.argsort(keys, kind="stable").astype(np.int64, copy=False)
    order.setflags(write=False)
    return order


def generator(*numbers: int) -> np.random.Generator:
    """A generator of its own for `numbers`."""
    return np.random.Generator(np.random.Philox(key=mixed(*numbers)))
