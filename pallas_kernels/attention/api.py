"""Attention in which a query sees the keys that a mask says, at the price of the blocks that are not empty."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.attention import gpu, reference, tpu, xla
from pallas_kernels.attention.algebra import Mask, shown
from pallas_kernels.attention.block_mask import BlockMask, SelectedBlocks, check_length, check_offset, inner, narrowed
from pallas_kernels.attention.lists import Segments, Sizes
from pallas_kernels.attention.patterns import FAR
from pallas_kernels.attention.score_mod import traced

IMPLEMENTATIONS: Mapping[str, Callable[..., Any]] = {
    "reference": reference.attend,
    "xla": xla.attend,
    "tpu": tpu.attend,
    "gpu": gpu.attend,
}
LARGEST = float(np.finfo(np.float32).max)
DTYPES = ("float32", "bfloat16", "float16", "float64")


def sparse_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask | BlockMask | SelectedBlocks,
    *,
    q_offset: int | jax.Array = 0,
    score_mod: Callable[..., jax.Array] | None = None,
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    sinks: jax.Array | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """softmax(scale q k') v over the keys that each query sees; the formula stands in `reference`.

    q: [batch, q_len, q_heads, d_qk]; k: [batch, kv_len, kv_heads, d_qk]; v: [batch, kv_len, kv_heads, d_v], all of one dtype:
        float32, bfloat16, float16 or (with x64) float64; JAX or NumPy; sharded over no Explicit mesh axes. q_heads is a
        multiple of kv_heads, and query head h reads key head h // (q_heads / kv_heads) (grouped queries: Ainslie et al. 2023,
        arXiv 2305.13245). Sums are float32 at least.
    mask: of `masks`; a BlockMask, whose blocks are then used; or SelectedBlocks, blocks that are data. One that tells about so
        many positions (`mask.length`), as documents do, takes no longer sequences.
    q_offset: position of the first query, int or integers [] or [batch], which may be traced: for steps against a cache.
        Queries lie between -2**30 and 2**30; an offset beyond is refused, and one that is a JAX array, whose values may not
        be known, is set to that limit. Nor is an array compared with `mask.length`: queries outside are seen as its first or
        its last.
    score_mod: (score, batch, head, q_index, kv_index) -> score, a function of single scores as FlexAttention takes it: arrays
        [], the score in the dtype of sums, the others int32; differentiated, also by the arrays it closes over. A function is
        known by identity: a new lambda compiles again, as a new Python number for q_offset does, and a traced one does not.
    segment_ids: int32 [batch, length], or a pair of them for queries and keys; a query sees the keys of its own segment only,
        and blocks without such pairs are skipped.
    sinks: [q_heads] scores of a key that all see and that has no value (Xiao et al. 2023, arXiv 2309.17453); differentiated.
    softcap: scores become softcap * tanh(score / softcap), before score_mod. It and scale are known beforehand.
    scale: 1 / sqrt(d_qk) if None.
    return_lse: also the log of the sum of exp(score), sinks included: float32 [batch, q_len, q_heads], differentiated.
    implementation: "reference", "xla", "tpu" or "gpu"; None takes the best that supports the call. The last two are for what is
        compiled for: the mesh in use, whose devices may be abstract, or the default backend.

    Returns [batch, q_len, q_heads, d_v] in q's dtype. Queries that see nothing get 0 (lse -inf) and have zero gradients; keys
    that are not seen have no influence, be they NaN. Raises ValueError for shapes and dtypes that do not fit,
    NotImplementedError from a named implementation for what it does not support, derivatives among them.
    """
    q, k, v = (_array(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    _check_qkv(q, k, v)
    b, t, h, d = q.shape
    s = k.shape[1]
    q_offset = _offset(q_offset, b, t)
    mask = _mask(mask, q, k, q_offset)
    if segment_ids is not None:
        segment_ids = _segments(segment_ids, b, t, s)
    if score_mod is not None:
        if not callable(score_mod):
            wanted = "a function (score, batch, head, q_index, kv_index) -> score"
            raise ValueError(f"score_mod: got {shown(score_mod)}, wanted {wanted}")
        traced(score_mod, jnp.promote_types(q.dtype, jnp.float32))
    if sinks is not None:
        sinks = _array("sinks", sinks)
        _expect("sinks", sinks.shape, (h,), "[q_heads]")
    softcap, scale = _number("softcap", softcap, "a positive"), _number("scale", scale, "a finite")
    out, lse = dispatch.run(
        "sparse_attention", IMPLEMENTATIONS, implementation, q, k, v, mask, q_offset=q_offset, score_mod=score_mod,
        segment_ids=segment_ids, sinks=sinks, softcap=softcap, scale=d**-0.5 if scale is None else scale,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _array(name: str, x: Any) -> jax.Array:
    if not isinstance(x, (jax.Array, np.ndarray)):
        raise ValueError(f"{name}: got {type(x).__name__}, wanted an array")
    dtype = jnp.result_type(x)
    if dtype.name not in DTYPES:
        raise ValueError(f"{name}: got dtype {dtype.name}, wanted one of {', '.join(DTYPES)}")
    return jnp.asarray(x)


def _number(name: str, value: Any, wanted: str) -> float | None:
    if value is None:
        return None
    fits = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if (
        not fits
        or not abs(value if isinstance(value, int) else float(value)) <= LARGEST
        or (value <= 0 and wanted == "a positive")
    ):
        raise ValueError(f"{name}: got {shown(value)}, wanted {wanted} number of Python or NumPy that float32 holds, or None")
    return float(value)


def _expect(name: str, got: tuple[int, ...], wanted: tuple[int, ...], words: str) -> None:
    if tuple(got) != tuple(wanted):
        raise ValueError(f"{name}: got shape {list(got)}, wanted {list(wanted)} {words}")


def _check_qkv(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name}: got shape {list(x.shape)}, wanted [batch, length, heads, head_dim]")
        if 0 in x.shape:
            raise ValueError(f"{name}: got shape {list(x.shape)}, wanted no empty axis")
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: got dtype {x.dtype}, wanted {q.dtype} as q has")
        if any(axis is not None for axis in jax.typeof(x).sharding.spec):
            raise ValueError(f"{name}: got {jax.typeof(x)}, wanted mesh axes that are Auto, as in jax.sharding.auto_axes")
    b, _, h, d = q.shape
    _expect("k", k.shape, (b, k.shape[1], k.shape[2], d), "[batch, kv_len, kv_heads, d_qk] beside q")
    _expect("v", v.shape, (*k.shape[:3], v.shape[3]), "[batch, kv_len, kv_heads, d_v] beside k")
    if h % k.shape[2]:
        raise ValueError(f"k: got {k.shape[2]} heads, wanted a divisor of q's {h}")


def _mask(mask: Any, q: jax.Array, k: jax.Array, q_offset: Any) -> Any:
    b, t, h, _ = q.shape
    s, kv_heads = k.shape[1], k.shape[2]
    if isinstance(mask, SelectedBlocks):
        mask = mask.checked(b, h, kv_heads, Sizes(t, s, mask.q_block, mask.kv_block))
    elif isinstance(mask, BlockMask):
        if mask.sizes[:2] != (t, s):
            raise ValueError(f"mask: got a BlockMask of {mask.sizes.q_len} x {mask.sizes.kv_len} pairs, wanted {t} x {s}")
        if isinstance(q_offset, int) and q_offset != mask.q_offset:
            raise ValueError(f"q_offset: got {q_offset}, wanted {mask.q_offset}, which the BlockMask was made with")
        for name, has, lists in (("heads", h, mask.heads), ("sequences", b, mask.batch)):
            if lists not in (1, has):
                raise ValueError(f"mask: got a BlockMask for {lists} {name}, wanted {has} as q has")
    elif not isinstance(mask, Mask):
        raise ValueError(
            f"mask: got {type(mask).__name__}, wanted a mask such as masks.causal(), a BlockMask or SelectedBlocks"
        )
    asked = inner(mask)
    for name, has, told in (("heads", h, asked.heads), ("sequences", b, asked.batch)):
        if told > 0 and told != has:
            raise ValueError(f"mask: got one of {told} {name}, wanted {has} as q has")
    check_length(asked, t, s, q_offset)
    return mask


def _offset(q_offset: Any, batch: int, q_len: int) -> Any:
    if isinstance(q_offset, (int, np.integer)) and not isinstance(q_offset, bool):
        check_offset(int(q_offset), q_len)
        return int(q_offset)
    if not isinstance(q_offset, (bool, float, np.generic, np.ndarray, jax.Array)):
        raise ValueError(f"q_offset: got {type(q_offset).__name__}, wanted a whole number, or integers [] or [{batch}]")
    shape, dtype = jnp.shape(q_offset), jnp.result_type(q_offset)
    if shape not in ((), (batch,)) or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"q_offset: got {dtype}{list(shape)}, wanted a whole number, or integers [] or [{batch}]")
    if isinstance(q_offset, np.ndarray):
        for known in q_offset.reshape(-1).tolist():
            check_offset(known, q_len)
    return narrowed(q_offset, -FAR, FAR - q_len)


def _segments(segment_ids: Any, b: int, t: int, s: int) -> Segments:
    pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    if len(pair) != 2:
        raise ValueError(f"segment_ids: got {len(pair)} arrays, wanted one or a pair, for queries and keys")
    for ids, length in zip(pair, (t, s)):
        if not isinstance(ids, (jax.Array, np.ndarray)):
            raise ValueError(f"segment_ids: got {type(ids).__name__}, wanted an array [batch, length] or a tuple of two")
        _expect("segment_ids", jnp.shape(ids), (b, length), "[batch, length]")
        if not jnp.issubdtype(jnp.result_type(ids), jnp.integer):
            raise ValueError(f"segment_ids: got dtype {jnp.result_type(ids)}, wanted integers")
        if isinstance(ids, np.ndarray) and (ids.min() < -(2**31) or ids.max() >= 2**31):
            raise ValueError(f"segment_ids: got ids from {ids.min()} to {ids.max()}, wanted such that int32 holds")
    return Segments(*(jnp.asarray(ids, jnp.int32) for ids in pair))
