"""What the passes of the TPU kernel share: the call with its static facts, packed lists, and masks inside of a kernel.

Operands are laid out [batch, heads, rows of blocks * block, head_dim], head dimensions padded with zeros to whole lanes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.block_mask import BlockMask
from pallas_kernels.attention.lists import FULL, PARTIAL, BlockLists, Sizes

LANES, SUBLANES = 128, 8
LOG2E = math.log2(math.e)
NT = (((1,), (1,)), ((), ()))  # a b'
NN = (((1,), (0,)), ((), ()))  # a b
TN = (((0,), (0,)), ((), ()))  # a' b
TT = (((0,), (1,)), ((), ()))  # a' b'
# A word of a list: row << 18 | column << 4 | last of its row << 3 | first of its row << 2 | kind
ROW, COLUMN, LAST, FIRST, KIND = 18, 4, 8, 4, 3
MOST_BLOCKS = 1 << 14  # rows or columns that a word can tell
MOST_PATTERN_BYTES = 1 << 27


@dataclasses.dataclass(frozen=True)
class Call:
    """Everything static about a call.

    heads are those of the kernel: where the queries of a group are folded together, query t of the group's head g is row
    t * fold + g of one key head, and heads equals kv_heads. list_heads: 1, kv_heads or heads.
    """

    batch: int
    heads: int
    kv_heads: int
    fold: int
    forward: Sizes
    backward: Sizes
    mask: Any  # None where `patterns` are looked up
    score_mod: Callable[..., Any] | None
    softcap: float | None
    scale: float
    segments: bool
    interpret: Any

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def precision(self, dtype: Any) -> Any:
        """float32 operands are multiplied as such, not rounded to bfloat16."""
        return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


class Lists(NamedTuple):
    """Packed lists of a pass.

    words: int32 [batch or 1 * list heads * n], for scalar memory; which: int32 of that shape, the pattern of an entry;
    patterns: int8 [patterns, block, block] as the pass lays out scores. Both are None where the mask is computed.
    """

    words: Any
    which: Any
    patterns: Any


@dataclasses.dataclass(frozen=True)
class Layout:
    """Static facts of packed lists: how many there are, of how many entries, and (if known) how many of these are visited."""

    batch: int
    heads: int
    n: int
    kinds: frozenset[int]
    visited: int | None

    def start(self, call: Call, b: Any, h: Any) -> Any:
        """Where the list of a sequence and a head of the kernel starts."""
        b = b if self.batch > 1 else 0
        h = h // (call.heads // self.heads) if self.heads > 1 else 0
        return (b * self.heads + h) * self.n


def pack(lists: BlockLists, which: Any = None, patterns: Any = None) -> tuple[Lists, Layout]:
    static = not any(isinstance(x, jax.Array) for x in lists)
    xp = np if static else jnp
    row, column, kind = (xp.asarray(x) for x in lists)
    changes = row[..., 1:] != row[..., :-1]
    edge = xp.ones_like(changes, shape=(*row.shape[:2], 1))
    first, last = xp.concatenate([edge, changes], -1), xp.concatenate([changes, edge], -1)
    words = (row << ROW) | (column << COLUMN) | (last * LAST) | (first * FIRST) | kind
    layout = Layout(
        *row.shape,
        kinds=frozenset(np.unique(kind).tolist()) if static else frozenset((PARTIAL, FULL)),
        visited=int((kind != 0).sum()) if static else None,
    )
    flat = None if which is None else np.asarray(which, np.int32).reshape(-1)
    return Lists(words.astype(np.int32).reshape(-1), flat, patterns), layout


def row_of(word: Any) -> Any:
    return jax.lax.shift_right_logical(word, jnp.int32(ROW))


def column_of(word: Any) -> Any:
    return jax.lax.shift_right_logical(word, jnp.int32(COLUMN)) & (MOST_BLOCKS - 1)


def looked_up(mask: BlockMask, lists: BlockLists, by_key: bool) -> tuple[np.ndarray, np.ndarray]:
    """(int8 patterns, int32 which of them each entry of `lists` has). by_key: of transposed lists, and patterns as key x query.
    An entry that needs none has that of the entry before, so that nothing is fetched for it."""
    patterns, which = mask.patterns
    sizes, (row, column, _) = mask.sizes, mask.lists
    if patterns.size > MOST_PATTERN_BYTES:
        raise NotImplementedError(
            f"mask: it is no index arithmetic, and tpu keeps its different partial blocks, up to {MOST_PATTERN_BYTES} bytes; "
            f"got {len(patterns)} of {sizes.q_block} x {sizes.kv_block}"
        )
    table = np.zeros((*which.shape[:2], sizes.rows, sizes.columns), np.int32)
    b, h = (np.arange(n).reshape(shape) for n, shape in zip(which.shape, ((-1, 1, 1), (1, -1, 1))))
    partial = mask.lists.kind == PARTIAL
    np.add.at(table, (*np.broadcast_arrays(b, h, row, column),), np.where(partial, which, 0))
    ours = table[b, h, lists.column, lists.row] if by_key else table[b, h, lists.row, lists.column]
    places = np.where(lists.kind == PARTIAL, np.arange(ours.shape[-1]), 0)
    ours = np.take_along_axis(ours, np.maximum.accumulate(places, axis=-1), axis=-1)
    return (patterns.swapaxes(1, 2) if by_key else patterns).astype(np.int8), ours


def across(x: Any, width: int) -> Any:
    """[rows, lanes], the same in all lanes -> [rows, width]."""
    lanes = x.shape[1]
    if width == lanes:
        return x
    return jnp.tile(x, (1, width // lanes)) if width % lanes == 0 else jnp.broadcast_to(x[:, :1], (x.shape[0], width))


class Place(NamedTuple):
    """Where a block of scores is, for the mask and score_mod: indices that broadcast to its shape."""

    batch: Any
    head: Any
    q_index: Any
    kv_index: Any


def place(call: Call, sizes: Sizes, b: Any, h: Any, offset: Any, row: Any, kv_first: Any, kv_count: int, q_axis: int) -> Place:
    """q_axis: along which axis of the scores the queries go. offset: position of query 0."""
    rows = sizes.q_block * call.fold
    q_shape, kv_shape = ((rows, 1), (1, kv_count)) if q_axis == 0 else ((1, rows), (kv_count, 1))
    inside = jax.lax.broadcasted_iota(jnp.int32, q_shape, q_axis)
    head = h
    if call.fold > 1:
        # jnp's // and % would spend instructions on negative numbers
        head = h * call.fold + jax.lax.rem(inside, jnp.int32(call.fold))
        inside = jax.lax.div(inside, jnp.int32(call.fold))
    kv_index = kv_first + jax.lax.broadcasted_iota(jnp.int32, kv_shape, 1 - q_axis)
    return Place(b, head, offset + row * sizes.q_block + inside, kv_index)


def visible(call: Call, sizes: Sizes, at: Place, pattern: Any, q_segments: Any, kv_segments: Any) -> Any:
    """bool of the scores' shape; pattern: int8 of that shape, or None where the mask is computed."""
    if pattern is None:
        seen = call.mask(*at)
        if sizes.kv_len % sizes.kv_block:
            seen = seen & (at.kv_index < sizes.kv_len)
    else:
        seen = pattern.astype(jnp.int32) != 0
    return seen if q_segments is None else seen & (q_segments == kv_segments)


def modified(call: Call, at: Place | None, product: Any) -> Any:
    """Scores from scale * q k', before the mask. `at` is needed by score_mod only."""
    score = product if call.softcap is None else call.softcap * jnp.tanh(product * (1 / call.softcap))
    return score if call.score_mod is None else call.score_mod(score, *at).astype(jnp.float32)


def logits(call: Call, at: Place | None, product: Any) -> Any:
    """Scores in units of log 2, so that the exponential is the hardware's power of two."""
    if call.score_mod is not None:
        return modified(call, at, product * call.scale) * LOG2E
    if call.softcap is not None:
        return (call.softcap * LOG2E) * jnp.tanh(product * (call.scale / call.softcap))
    return product * (call.scale * LOG2E)


def differentiated(call: Call, at: Place | None, product: Any) -> tuple[Any, Callable[[Any], Any]]:
    """(`logits`, gradient by scores -> gradient by scale * q k'). `scale` itself is left out: it is multiplied to dq and dk."""
    if call.score_mod is None and call.softcap is None:
        return logits(call, at, product), lambda ds: ds
    if call.score_mod is None:
        bent = jnp.tanh(product * (call.scale / call.softcap))
        return (call.softcap * LOG2E) * bent, lambda ds: ds * (1 - bent * bent)
    score, pull = jax.vjp(functools.partial(modified, call, at), product * call.scale)
    return score * LOG2E, lambda ds: pull(ds)[0]


def dot(call: Call, a: Any, b: Any, dimensions: Any) -> Any:
    """Product with float32 sums."""
    return jax.lax.dot_general(a, b, dimensions, precision=call.precision(b.dtype), preferred_element_type=jnp.float32)


def mapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays which under vmap runs once for every element: a kernel's block of HBM cannot be one of a batch."""

    @jax.custom_batching.custom_vmap
    def run(*arrays: Any) -> Any:
        return function(*arrays)

    @run.def_vmap
    def _(size: int, batched: Any, *arrays: Any) -> Any:
        leaves, tree = jax.tree.flatten(arrays)
        which = jax.tree.leaves(batched)

        def one(index: Any) -> Any:
            return run(*jax.tree.unflatten(tree, [jnp.asarray(x)[index] if b else x for x, b in zip(leaves, which)]))

        out = jax.lax.map(one, jnp.arange(size))
        return out, jax.tree.map(lambda _: True, out)

    return run
