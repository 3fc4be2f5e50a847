"""Masks of pieces: what a mask says of sequences that begin later than at 0, in as few words as it takes.

Where it is plain to see that a mask says the same of two pairs of pieces, their masks are equal.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from pallas_kernels.attention.algebra import Both, Either, Mask, Not, PerHead
from pallas_kernels.attention.patterns import BlockWindow, Everything, Prefix, Strided, Window

NOTHING = Not(Everything())


@dataclasses.dataclass(frozen=True, repr=False)
class Shifted(Mask):
    """What the mask says of q + q_by and kv + kv_by. `shifted` makes it."""

    mask: Mask
    q_by: int
    kv_by: int

    analytic = property(lambda self: self.mask.analytic)  # type: ignore[assignment]
    exact = property(lambda self: self.mask.exact)  # type: ignore[assignment]
    heads = property(lambda self: self.mask.heads)  # type: ignore[assignment]
    batch = property(lambda self: self.mask.batch)  # type: ignore[assignment]

    @property
    def length(self) -> int | None:  # type: ignore[override]
        return None if self.mask.length is None else self.mask.length - max(self.q_by, self.kv_by)

    def __call__(self, batch, head, q_index, kv_index):
        return self.mask(batch, head, q_index + self.q_by, kv_index + self.kv_by)

    def bounds(self, batch, head, q_first, q_last, kv_first, kv_last):
        return self.mask.bounds(
            batch, head, q_first + self.q_by, q_last + self.q_by, kv_first + self.kv_by, kv_last + self.kv_by
        )

    def __repr__(self) -> str:
        return f"shifted({self.mask!r}, {self.q_by}, {self.kv_by})"


def shifted(mask: Mask, q_by: int, kv_by: int) -> Mask:
    """The mask that sees (q, kv) where `mask` sees (q + q_by, kv + kv_by)."""
    apart = q_by - kv_by
    match mask:
        case Everything():
            return mask
        case Window(left, right):
            return Window(None if left is None else left - apart, None if right is None else right + apart)
        case Prefix(n, axis):
            return Prefix(n - (q_by, kv_by)[axis], axis)
        case Strided(stride):
            q_by, kv_by = apart % stride, 0
        case BlockWindow(size, _, _):
            whole = min(q_by, kv_by) // size * size
            q_by, kv_by = q_by - whole, kv_by - whole
        case Both(left, right) | Either(left, right):
            return type(mask)(shifted(left, q_by, kv_by), shifted(right, q_by, kv_by))
        case Not(inside):
            return ~shifted(inside, q_by, kv_by)
        case PerHead(masks):
            return PerHead(tuple(shifted(one, q_by, kv_by) for one in masks))
        case Shifted(inside, q_before, kv_before):
            return shifted(inside, q_by + q_before, kv_by + kv_before)
    return Shifted(mask, q_by, kv_by) if q_by or kv_by else mask


def bounds_of_all(mask: Mask, q_first: Any, q_last: Any, kv_first: Any, kv_last: Any) -> tuple[Any, Any]:
    """(some, every) of rectangles of pairs, ends included, for all sequences and heads together: NumPy arrays in, bool arrays
    out. Bounds, as `Mask.bounds` gives them."""
    each = [
        mask.bounds(b, h, q_first, q_last, kv_first, kv_last)
        for b in range(max(mask.batch, 1))
        for h in range(max(mask.heads, 1))
    ]
    some, every = (np.stack([np.asarray(one[i]) for one in each]) for i in range(2))
    return some.any(0), every.all(0)


def simplified(mask: Mask, q_len: int, kv_len: int) -> Mask:
    """A mask that says the same of q_len x kv_len pairs, without the parts that see all or nothing of them."""
    some, every = bounds_of_all(mask, *(np.array([end]) for end in (0, q_len - 1, 0, kv_len - 1)))
    if not some[0] or every[0]:
        return Everything() if some[0] else NOTHING
    match mask:
        case Both(left, right):
            parts = [simplified(one, q_len, kv_len) for one in (left, right)]
            if NOTHING in parts:
                return NOTHING
            return _joined(Both, [one for one in parts if one != Everything()])
        case Either(left, right):
            parts = [simplified(one, q_len, kv_len) for one in (left, right)]
            if Everything() in parts:
                return Everything()
            return _joined(Either, [one for one in parts if one != NOTHING])
        case Not(inside):
            return ~simplified(inside, q_len, kv_len)
        case PerHead(masks):
            return PerHead(tuple(simplified(one, q_len, kv_len) for one in masks))
    return mask


def _joined(kind: Any, parts: list[Mask]) -> Mask:
    """Of one or two parts that are left, neither of which decides alone."""
    if not parts:
        return Everything() if kind is Both else NOTHING
    return parts[0] if len(parts) == 1 else kind(*parts)
