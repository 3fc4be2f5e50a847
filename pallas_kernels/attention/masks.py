"""Which query sees which key: values with an algebra.

A mask says bool for (batch, head, q_index, kv_index), combines with `&`, `|` and `~`, and is hashable: equal masks are equal
values. Indices broadcast and may be NumPy or JAX arrays, so that one definition serves the blocks that are looked at before
anything compiles, the kernels, and the dense reference.

Besides the single pairs, a mask bounds whole rectangles of pairs, which is how 131,072 x 131,072 pairs are sorted into blocks
without being looked at one by one.

Sizes and positions are whole numbers that int32 holds; a size beyond the sequence, up to 2**31 - 1, is as good as none. What
does not fit raises a ValueError of one line: the argument, what was given, what is allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.algebra import Data, Mask, PerHead, shown
from pallas_kernels.attention.patterns import (
    LARGEST,
    Blocks,
    BlockWindow,
    Document,
    Everything,
    Function,
    Positions,
    Prefix,
    Strided,
    Window,
    looks,
)


def full() -> Mask:
    """Every query sees every key."""
    return Everything()


def causal() -> Mask:
    """kv <= q."""
    return Window(None, 0)


def window(left: int | None, right: int | None) -> Mask:
    """q - left <= kv <= q + right, as `local_window_size` of `jax.nn.dot_product_attention`; None is without end."""
    return Window(*(None if n is None else _whole(f"window's {name}", n, 0) for name, n in (("left", left), ("right", right))))


def block_window(size: int, left: int, right: int) -> Mask:
    """A window counted in blocks of `size` positions: q // size - left <= kv // size <= q // size + right."""
    _whole("block_window's size", size, 1)
    return BlockWindow(size, _whole("block_window's left", left, 0), _whole("block_window's right", right, 0))


def prefix(n: int) -> Mask:
    """kv < n: all see the first n keys. `causal() | prefix(n)` is the mask of a prefix language model."""
    return Prefix(_whole("prefix's n", n, 0), 1)


def document(ids: Any) -> Mask:
    """ids[q] == ids[kv], for int ids [length] or [batch, length] that are known when the mask is made (those that are data of a
    step are `segment_ids` of `sparse_attention`). Sorted ids make quick work of long sequences. Sequences longer than ids,
    and queries before the first are refused."""
    if isinstance(ids, jax.core.Tracer):
        raise ValueError("document's ids are traced, and a mask is a value; pass them as segment_ids of sparse_attention")
    try:
        values = np.asarray(ids)
    except (TypeError, ValueError):  # rows of several lengths; an array that is traced within
        raise ValueError(f"document's ids: got {shown(ids)}, wanted integers [length] or [batch, length]") from None
    if values.ndim not in (1, 2) or not np.issubdtype(values.dtype, np.integer) or not values.size:
        raise ValueError(f"document's ids: got {values.dtype}{list(values.shape)}, wanted integers [length] or [batch, length]")
    if values.min() < np.iinfo(np.int32).min or values.max() > np.iinfo(np.int32).max:  # which JAX would cut off
        values = np.unique(values, return_inverse=True)[1].reshape(values.shape)
    return Document(Data(values), bool((values[..., 1:] >= values[..., :-1]).all()))


def strided(stride: int) -> Mask:
    """(q - kv) % stride == 0. With a window it is the strided pattern of Sparse Transformers (Child et al. 2019, arXiv
    1904.10509, section 4.3): `causal() & (window(l, 0) | strided(l))`."""
    return Strided(_whole("strided's stride", stride, 1))


def dilated(left: int, right: int, step: int) -> Mask:
    """A window with gaps: kv = q + i * step for -left <= i <= right (Longformer's dilated window; Beltagy et al. 2020, arXiv
    2004.05150, section 3.1)."""
    _whole("dilated's step", step, 1)
    ends = (_whole(f"dilated's {name}", n, 0) for name, n in (("left", left), ("right", right)))
    return Window(*(_whole("dilated's reach in positions", n * step, 0) for n in ends)) & Strided(int(step))


def global_tokens(which: int | Sequence[int]) -> Mask:
    """The tokens at these positions (the first n, if an int) see all and are seen by all (Longformer's global attention,
    symmetric; arXiv 2004.05150, section 3.1)."""
    if isinstance(which, (int, np.integer)):
        n = _whole("global_tokens' n", which, 0)
        return Prefix(n, 0) | Prefix(n, 1)
    if (
        not isinstance(which, (Sequence, np.ndarray, jax.Array))
        or isinstance(which, (str, jax.core.Tracer))
        or not np.ndim(which)
    ):
        raise ValueError(f"global_tokens: got {shown(which)}, wanted a whole number or a sequence of them")
    positions = tuple(sorted({_whole("global_tokens' position", position, 0) for position in which}))
    if not positions:
        raise ValueError("global_tokens: got no positions, wanted one or more")
    return Positions(positions, 0) | Positions(positions, 1)


def random_blocks(key: Any, size: int, count: int, length: int, heads: int = 0) -> Mask:
    """Every block of `size` queries sees `count` blocks of `size` keys, drawn without replacement from those of `length` keys,
    for each of `heads` heads anew (0: shared). key: an int or a JAX key; equal keys draw equal blocks. Longer sequences, and
    queries before the first, are refused."""
    size, count, length = (
        _whole(f"random_blocks' {name}", value, 1) for name, value in (("size", size), ("count", count), ("length", length))
    )
    n = -(-length // size)
    if count > n:
        raise ValueError(f"random_blocks' count: got {count}, wanted at most the {n} blocks of {size} in {length} keys")
    generator = np.random.default_rng(_seed(key))
    order = generator.random((_whole("random_blocks' heads", heads, 0) or 1, n, n)).argpartition(count - 1, axis=-1)[
        ..., :count
    ]
    table = np.zeros((heads or 1, n, n), bool)
    np.put_along_axis(table, order, True, axis=-1)
    return Blocks(Data(table if heads else table[0]), size, length)


def bigbird(key: Any, size: int, length: int, window: int = 3, global_blocks: int = 2, count: int = 3, heads: int = 0) -> Mask:
    """BigBird's blocks of `size`: a window of `window` blocks, the first `global_blocks` blocks seen by all and seeing all, and
    `count` random ones (Zaheer et al. 2020, arXiv 2007.14062, section 2 and appendix D, whose sizes the defaults are).
    window is odd: as many blocks before a query's own as after it."""
    least = {"size": 1, "length": 1, "window": 1, "global_blocks": 0, "count": 0, "heads": 0}
    given = {"size": size, "length": length, "window": window, "global_blocks": global_blocks, "count": count, "heads": heads}
    for name, value in given.items():
        _whole(f"bigbird's {name}", value, least[name])
    if window % 2 == 0:
        raise ValueError(
            f"bigbird's window: got {window}, wanted an odd number of blocks; nearest: {window - 1} or {window + 1}"
        )
    if not count:
        _seed(key)
    mask = block_window(size, window // 2, window // 2)
    if global_blocks:
        mask = mask | global_tokens(_whole("bigbird's global_blocks in positions", global_blocks * size, 0))
    return mask | random_blocks(key, size, count, length, heads) if count else mask


def per_head(*masks: Mask) -> Mask:
    """The i-th mask for query head i."""
    if not masks:
        raise ValueError("per_head: got no masks, wanted one a query head")
    for mask in masks:
        if not isinstance(mask, Mask):
            raise ValueError(f"per_head: got {type(mask).__name__}, wanted masks such as causal(), one a query head")
    return PerHead(masks)


def from_function(mask_mod: Callable[[Any, Any, Any, Any], Any]) -> Mask:
    """A mask_mod as FlexAttention takes it: (batch, head, q_index, kv_index) -> bool, called with integer arrays that
    broadcast.

    It is compared by identity, and looked at pair by pair when its blocks are sorted. Raises ValueError if its result is no
    bool or if it closes over a traced array.
    """
    if not callable(mask_mod):
        raise ValueError(f"from_function: got {mask_mod!r}, wanted a function (batch, head, q_index, kv_index) -> bool")
    looks(mask_mod)
    return Function(mask_mod)


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name}: got {shown(value)}, wanted a whole number >= {least}")
    if value > LARGEST:
        raise ValueError(f"{name}: got {shown(value)}, wanted a whole number <= {LARGEST}, which int32 holds")
    return int(value)


def _seed(key: Any) -> list[int]:
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        return [int(key) & 0xFFFFFFFF, int(key) >> 32 & 0xFFFFFFFF]
    if isinstance(key, jax.core.Tracer):
        raise ValueError("random_blocks' key is traced, and a mask is a value; draw it outside of jit")
    data = key
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        data = jax.random.key_data(key)
    if not isinstance(data, (jax.Array, np.ndarray)) or not jnp.issubdtype(data.dtype, jnp.integer):
        raise ValueError(f"random_blocks' key: got {shown(key)}, wanted an int or a JAX key")
    return [int(word) for word in np.asarray(data).reshape(-1)]
