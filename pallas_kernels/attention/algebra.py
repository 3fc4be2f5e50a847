"""The algebra of masks: what a mask is, and what combines masks. `masks` has what users call, `patterns` the single masks."""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ANY = -1  # of Mask.heads and Mask.batch


class Data:
    """A constant array inside a mask, compared and hashed by its content."""

    def __init__(self, values: Any):
        self.values = np.array(values, order="C")  # its own, which nobody else can write to
        self.values.setflags(write=False)
        digest = hashlib.sha256(self.values.tobytes()).digest()
        self.key = (digest, self.values.shape, self.values.dtype.str)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Data) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"<{'x'.join(map(str, self.values.shape))}>"


def traced(*indices: Any) -> bool:
    return any(isinstance(i, jax.Array) for i in indices)


def shown(value: Any) -> str:
    """What was given, as it fits into a line of an error."""
    try:
        text = f"{value.dtype.name}{list(value.shape)}" if isinstance(value, (jax.Array, np.ndarray)) else repr(value)
    except ValueError:  # which an int of thousands of digits raises
        text = type(value).__name__
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:59]}…"


def at(values: np.ndarray, index: Any) -> Any:
    """values[index] along the first axis; an index beyond an end takes what is at the end."""
    return (
        jnp.take(jnp.asarray(values), index, axis=0, mode="clip") if traced(index) else np.take(values, index, 0, mode="clip")
    )


class Mask(abc.ABC):
    """What all masks are. Frozen dataclasses of hashable fields; see `Everything` for the smallest.

    analytic: index arithmetic decides, no array is looked at; kernels then compute the mask where they need it.
    exact: `bounds` tells the truth about every rectangle, not only a bound of it.
    heads, batch: 0 if it is the same for all heads (sequences), how many it tells apart, or ANY if it does for any number.
    length: how many positions it tells about, of queries and of keys; None: any number.
    """

    analytic: bool = True
    exact: bool = True
    heads: int = 0
    batch: int = 0
    length: int | None = None

    @abc.abstractmethod
    def __call__(self, batch: Any, head: Any, q_index: Any, kv_index: Any) -> Any:
        """bool, of the broadcast shape of the indices: does the query see the key?"""

    def as_global(self, other: Mask) -> str:
        """How `other | self` prints where the two together are `global_tokens`; else ""."""
        return ""

    @abc.abstractmethod
    def bounds(self, batch: int, head: int, q_first: Any, q_last: Any, kv_first: Any, kv_last: Any) -> tuple[Any, Any]:
        """(some, every) for rectangles of pairs, ends included: no pair is seen unless `some`; all are if `every`."""

    def __and__(self, other: Mask) -> Mask:
        return _joined(Both, self, other)

    def __or__(self, other: Mask) -> Mask:
        return _joined(Either, self, other)

    def __invert__(self) -> Mask:
        return self.mask if isinstance(self, Not) else Not(self)

    def __bool__(self) -> bool:
        raise TypeError("a mask is neither true nor false; combine masks with &, |, ~ instead of and, or, not")


def _joined(kind: Callable[[Mask, Mask], Mask], left: Mask, right: Mask) -> Mask:
    return kind(left, right) if isinstance(right, Mask) else NotImplemented


def _count(name: str, parts: Sequence[int]) -> int:
    told = sorted({n for n in parts if n > 0})
    if len(told) > 1:
        raise ValueError(f"masks of {told[0]} and of {told[1]} {name} cannot be combined; all but shared ones must agree")
    return told[0] if told else min(parts)


def _least(parts: Iterable[Mask]) -> int | None:
    return min((mask.length for mask in parts if mask.length is not None), default=None)


@dataclasses.dataclass(frozen=True, repr=False)
class _Pair(Mask):
    left: Mask
    right: Mask

    def __post_init__(self) -> None:
        self.heads, self.batch  # noqa: B018 - which raises where they do not agree

    analytic = property(lambda self: self.left.analytic and self.right.analytic)  # type: ignore[assignment]
    exact = property(lambda self: False)  # type: ignore[assignment]
    heads = property(lambda self: _count("heads", [self.left.heads, self.right.heads]))  # type: ignore[assignment]
    batch = property(lambda self: _count("sequences", [self.left.batch, self.right.batch]))  # type: ignore[assignment]
    length = property(lambda self: _least([self.left, self.right]))  # type: ignore[assignment]


class Both(_Pair):
    """Seen by both."""

    def __call__(self, batch, head, q_index, kv_index):
        return self.left(batch, head, q_index, kv_index) & self.right(batch, head, q_index, kv_index)

    def bounds(self, *rectangle):
        (some, every), (some_too, every_too) = self.left.bounds(*rectangle), self.right.bounds(*rectangle)
        return some & some_too, every & every_too

    def __repr__(self) -> str:
        return f"({self.left!r} & {self.right!r})"


class Either(_Pair):
    """Seen by one or both."""

    def __call__(self, batch, head, q_index, kv_index):
        return self.left(batch, head, q_index, kv_index) | self.right(batch, head, q_index, kv_index)

    def bounds(self, *rectangle):
        (some, every), (some_too, every_too) = self.left.bounds(*rectangle), self.right.bounds(*rectangle)
        return some | some_too, every | every_too

    def __repr__(self) -> str:
        return self.right.as_global(self.left) or f"({self.left!r} | {self.right!r})"


@dataclasses.dataclass(frozen=True, repr=False)
class Not(Mask):
    """Seen where the other is not."""

    mask: Mask

    analytic = property(lambda self: self.mask.analytic)  # type: ignore[assignment]
    exact = property(lambda self: self.mask.exact)  # type: ignore[assignment]
    heads = property(lambda self: self.mask.heads)  # type: ignore[assignment]
    batch = property(lambda self: self.mask.batch)  # type: ignore[assignment]
    length = property(lambda self: self.mask.length)  # type: ignore[assignment]

    def __call__(self, batch, head, q_index, kv_index):
        return inverse(self.mask(batch, head, q_index, kv_index))

    def bounds(self, *rectangle):
        some, every = self.mask.bounds(*rectangle)
        return ~every, ~some

    def __repr__(self) -> str:
        return f"~{self.mask!r}"


def inverse(seen: Any) -> Any:
    """~seen, also where single Python ints were asked about, whose answer is a bool of Python."""
    return not seen if isinstance(seen, bool) else ~seen


def never(*indices: Any) -> Any:
    """False, of the broadcast shape."""
    total = functools.reduce(operator.add, indices)
    return total != total


@dataclasses.dataclass(frozen=True, repr=False)
class PerHead(Mask):
    """A mask of its own for every head."""

    masks: tuple[Mask, ...]

    def __post_init__(self) -> None:
        if any(mask.heads for mask in self.masks):
            raise ValueError("per_head takes masks that are the same for all heads")
        self.batch  # noqa: B018 - which raises where they do not agree

    analytic = property(lambda self: all(mask.analytic for mask in self.masks))  # type: ignore[assignment]
    exact = property(lambda self: all(mask.exact for mask in self.masks))  # type: ignore[assignment]
    heads = property(lambda self: len(self.masks))  # type: ignore[assignment]
    batch = property(lambda self: _count("sequences", [mask.batch for mask in self.masks]))  # type: ignore[assignment]
    length = property(lambda self: _least(self.masks))  # type: ignore[assignment]

    def __call__(self, batch, head, q_index, kv_index):
        if isinstance(head, (int, np.integer)):
            return self.masks[head](batch, head, q_index, kv_index)
        seen = never(head, q_index, kv_index)
        for mask in dict.fromkeys(self.masks):
            here = functools.reduce(operator.or_, [head == h for h, other in enumerate(self.masks) if other == mask])
            seen = seen | (here & mask(batch, head, q_index, kv_index))
        return seen

    def bounds(self, batch, head, *ends):
        return self.masks[head].bounds(batch, head, *ends)

    def __repr__(self) -> str:
        return f"per_head({', '.join(map(repr, self.masks))})"
