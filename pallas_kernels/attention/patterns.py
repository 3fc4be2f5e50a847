"""The single masks: dataclasses that compare by their sizes, or by the content of their arrays."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Var

from pallas_kernels.attention.algebra import ANY, Data, Mask, at, inverse, never, traced
from pallas_kernels.attention.functions import program_of

LARGEST = 2**31 - 1  # of int32, which indices are
FAR = 2**30  # beyond any position


def moved(index: Any, by: int) -> Any:
    """index + by, which ends where int32 does and does not wrap."""
    if -FAR < by < FAR:  # no position goes as far as that
        return index + by
    xp, by = jnp if traced(index) else np, min(max(by, -LARGEST), LARGEST)
    return xp.minimum(index, LARGEST - by) + by if by > 0 else xp.maximum(index, -LARGEST - by) + by


@dataclasses.dataclass(frozen=True, repr=False)
class Everything(Mask):
    """Every query sees every key."""

    def __call__(self, batch, head, q_index, kv_index):
        return inverse(never(q_index, kv_index))

    def bounds(self, batch, head, q_first, q_last, kv_first, kv_last):
        yes = ~never(q_first, kv_first)
        return yes, yes

    def __repr__(self) -> str:
        return "full()"


@dataclasses.dataclass(frozen=True, repr=False)
class Window(Mask):
    """q - left <= kv <= q + right; None: without end."""

    left: int | None
    right: int | None

    def __call__(self, batch, head, q_index, kv_index):
        seen = inverse(never(q_index, kv_index)) if self.left is None and self.right is None else True
        if self.left is not None:
            seen = seen & (kv_index >= moved(q_index, -self.left))
        if self.right is not None:
            seen = seen & (kv_index <= moved(q_index, self.right))
        return seen

    def bounds(self, batch, head, q_first, q_last, kv_first, kv_last):
        some = every = ~never(q_first, kv_first)
        if self.left is not None:
            least = [moved(end, -self.left) for end in (q_first, q_last)]
            some, every = some & (kv_last >= least[0]), every & (kv_first >= least[1])
        if self.right is not None:
            most = [moved(end, self.right) for end in (q_first, q_last)]
            some, every = some & (kv_first <= most[1]), every & (kv_last <= most[0])
        return some, every

    def __repr__(self) -> str:
        return "causal()" if (self.left, self.right) == (None, 0) else f"window({self.left}, {self.right})"


@dataclasses.dataclass(frozen=True, repr=False)
class BlockWindow(Mask):
    """A window counted in blocks: q // size - left <= kv // size <= q // size + right."""

    size: int
    left: int
    right: int

    def _window(self) -> Window:
        return Window(self.left, self.right)

    def __call__(self, batch, head, q_index, kv_index):
        return self._window()(batch, head, q_index // self.size, kv_index // self.size)

    def bounds(self, batch, head, *ends):
        return self._window().bounds(batch, head, *(end // self.size for end in ends))

    def __repr__(self) -> str:
        return f"block_window({self.size}, {self.left}, {self.right})"


@dataclasses.dataclass(frozen=True, repr=False)
class Prefix(Mask):
    """The query's position (axis 0) or the key's (axis 1) is below n."""

    n: int
    axis: int

    def __call__(self, batch, head, q_index, kv_index):
        return ((q_index, kv_index)[self.axis] < self.n) | never(q_index, kv_index)

    def bounds(self, batch, head, q_first, q_last, kv_first, kv_last):
        no = never(q_first, kv_first)
        return ((q_first, kv_first)[self.axis] < self.n) | no, ((q_last, kv_last)[self.axis] < self.n) | no

    def __repr__(self) -> str:
        return f"{('first_queries', 'prefix')[self.axis]}({self.n})"

    def as_global(self, other: Mask) -> str:
        return f"global_tokens({self.n})" if self.axis and other == Prefix(self.n, 0) else ""


@dataclasses.dataclass(frozen=True, repr=False)
class Strided(Mask):
    """(q - kv) is a multiple of `stride`."""

    stride: int

    def __call__(self, batch, head, q_index, kv_index):
        return (q_index - kv_index) % self.stride == 0

    def bounds(self, batch, head, q_first, q_last, kv_first, kv_last):
        least, most = q_first - kv_last, q_last - kv_first
        single = (least == most) & (most % self.stride == 0)
        return most // self.stride * self.stride >= least, single | (self.stride == 1)

    def __repr__(self) -> str:
        return f"strided({self.stride})"


@dataclasses.dataclass(frozen=True, repr=False)
class Positions(Mask):
    """The query's position (axis 0) or the key's (axis 1) is one of those given."""

    which: tuple[int, ...]
    axis: int

    analytic = property(lambda self: len(self.which) <= 16)  # type: ignore[assignment]

    def __call__(self, batch, head, q_index, kv_index):
        index = (q_index, kv_index)[self.axis]
        if self.analytic:
            chosen = functools.reduce(operator.or_, [index == position for position in self.which])
        else:
            sorted_ = np.asarray(self.which)
            xp = jnp if traced(index) else np
            chosen = at(sorted_, xp.searchsorted(sorted_, index)) == index
        return chosen | never(q_index, kv_index)

    def bounds(self, batch, head, q_first, q_last, kv_first, kv_last):
        first, last = ((q_first, q_last), (kv_first, kv_last))[self.axis]
        xp, sorted_ = jnp if traced(first, last) else np, np.asarray(self.which)
        inside = xp.searchsorted(sorted_, last, side="right") - xp.searchsorted(sorted_, first, side="left")
        no = never(q_first, kv_first)
        return (inside > 0) | no, (inside == last - first + 1) | no

    def __repr__(self) -> str:
        return f"{('queries', 'keys')[self.axis]}{self._listed()}"

    def as_global(self, other: Mask) -> str:
        return f"global_tokens({self._listed()})" if self.axis and other == Positions(self.which, 0) else ""

    def _listed(self) -> str:
        more = ", …" if len(self.which) > 8 else ""
        return f"[{', '.join(map(str, self.which[:8]))}{more}]"


@dataclasses.dataclass(frozen=True, repr=False)
class Document(Mask):
    """Query and key belong to the same document."""

    ids: Data  # [length] or [batch, length]
    ordered: bool

    analytic = False
    exact = False
    batch = property(lambda self: len(self.ids.values) if self.ids.values.ndim == 2 else 0)  # type: ignore[assignment]
    length = property(lambda self: self.ids.values.shape[-1])  # type: ignore[assignment]

    def _of(self, batch: Any, index: Any) -> Any:
        if not self.batch:
            return at(self.ids.values, index)
        length = self.ids.values.shape[1]
        xp = jnp if traced(batch, index) else np
        return at(self.ids.values.reshape(-1), xp.clip(index, 0, length - 1) + xp.clip(batch, 0, self.batch - 1) * length)

    def __call__(self, batch, head, q_index, kv_index):
        return self._of(batch, q_index) == self._of(batch, kv_index)

    def bounds(self, batch, head, q_first, q_last, kv_first, kv_last):
        no = never(q_first, kv_first)
        if not self.ordered:
            return ~no, no
        a, b, c, d = (self._of(batch, end) for end in (q_first, q_last, kv_first, kv_last))
        return ((a <= d) & (c <= b)) | no, ((a == d) & (b == c)) | no

    def __repr__(self) -> str:
        return f"document({self.ids!r})"


@dataclasses.dataclass(frozen=True, repr=False)
class Blocks(Mask):
    """A table of blocks: bool [rows, columns] or [heads, rows, columns], of `size` x `size` pairs each."""

    table: Data
    size: int
    positions: int | None = None  # of queries and of keys, where the last block reaches beyond

    analytic = False
    heads = property(lambda self: len(self.table.values) if self.table.values.ndim == 3 else 0)  # type: ignore[assignment]
    length = property(lambda self: self.positions or self.size * min(self.table.values.shape[-2:]))  # type: ignore[assignment]

    def __call__(self, batch, head, q_index, kv_index):
        *_, rows, columns = self.table.values.shape
        xp = jnp if traced(head, q_index, kv_index) else np
        row, column = xp.clip(q_index // self.size, 0, rows - 1), xp.clip(kv_index // self.size, 0, columns - 1)
        if self.heads:
            row = row + rows * xp.clip(head, 0, self.heads - 1)
        return at(self.table.values.reshape(-1), row * columns + column)

    def bounds(self, batch, head, q_first, q_last, kv_first, kv_last):
        sums = _sums(self.table)[head if self.heads else 0]
        rows, columns = sums.shape[0] - 1, sums.shape[1] - 1
        xp = jnp if traced(q_first, kv_first) else np
        ends = [
            xp.clip(end // self.size, 0, n - 1)
            for end, n in ((q_first, rows), (q_last, rows), (kv_first, columns), (kv_last, columns))
        ]
        (top, left), (bottom, right) = (ends[0], ends[2]), (ends[1] + 1, ends[3] + 1)

        def above(row, column):
            return at(sums.reshape(-1), row * (columns + 1) + column)

        seen = above(bottom, right) - above(top, right) - above(bottom, left) + above(top, left)
        return seen > 0, seen == (bottom - top) * (right - left)

    def __repr__(self) -> str:
        return f"blocks({self.table!r}, {self.size})"


@functools.lru_cache(maxsize=64)
def _sums(table: Data) -> np.ndarray:
    """int64 [heads, rows + 1, columns + 1]: how many blocks are set above and to the left."""
    sums = np.atleast_3d(table.values.T).T.astype(np.int64).cumsum(-1).cumsum(-2)
    return np.pad(sums, [(0, 0), (1, 0), (1, 0)])


class Looks(NamedTuple):
    """What a function of (batch, head, q_index, kv_index) looks at."""

    batch: bool
    head: bool
    arrays: bool  # of its own


@functools.lru_cache(maxsize=256)
def looks(function: Callable[..., Any]) -> Looks:
    """Read off the function's jaxpr: what its result is computed from."""
    index = jax.ShapeDtypeStruct((), jnp.int32)
    with jax.ensure_compile_time_eval():
        program, result = program_of(function, "a mask_mod", ("batch", "head", "q_index", "kv_index"), [index] * 4)
    if any(isinstance(const, jax.core.Tracer) for const in program.consts):
        raise ValueError(
            "a mask_mod closes over a traced array, and a mask is a value; for data of a step there are segment_ids"
        )
    if result != "bool[]":
        raise ValueError(f"a mask_mod's result for single indices: got {result}, wanted one bool[]")
    wanted = {v for v in program.jaxpr.outvars if isinstance(v, Var)}
    for equation in reversed(program.jaxpr.eqns):
        if wanted & set(equation.outvars):
            wanted |= {v for v in equation.invars if isinstance(v, Var)}
    batch, head, *_ = (v in wanted for v in program.jaxpr.invars)
    return Looks(batch, head, bool(program.consts))


@dataclasses.dataclass(frozen=True, repr=False)
class Function(Mask):
    """A user's function of (batch, head, q_index, kv_index). Nothing is known of a rectangle before its pairs are looked at."""

    function: Callable[[Any, Any, Any, Any], Any]

    exact = False
    analytic = property(lambda self: not looks(self.function).arrays)  # type: ignore[assignment]
    heads = property(lambda self: ANY if looks(self.function).head else 0)  # type: ignore[assignment]
    batch = property(lambda self: ANY if looks(self.function).batch else 0)  # type: ignore[assignment]

    def __call__(self, batch, head, q_index, kv_index):
        # always JAX's int32, as in kernels: NumPy's int64 does not wrap, and ~True is -2 in Python
        indices = (jnp.asarray(index, jnp.int32) for index in (batch, head, q_index, kv_index))
        return self.function(*indices) | never(q_index, kv_index)

    def bounds(self, batch, head, q_first, q_last, kv_first, kv_last):
        no = never(q_first, kv_first)
        return ~no, no

    def __repr__(self) -> str:
        return f"from_function({getattr(self.function, '__name__', self.function)})"
