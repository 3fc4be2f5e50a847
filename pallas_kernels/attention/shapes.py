"""Named realistic shapes, and what `make aot` compiles of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import gpu, masks
from pallas_kernels.attention.api import sparse_attention
from pallas_kernels.attention.block_mask import SelectedBlocks
from pallas_kernels.attention.lists import Segments
from pallas_kernels.cases import Build, Case


class Shape(NamedTuple):
    """Sizes of a call, its mask, and the arguments besides: `fixed` as they are, `data` as shapes of what a step brings."""

    batch: int
    q_len: int
    kv_len: int
    q_heads: int
    kv_heads: int
    head_dim: int
    mask: Callable[[], Any]
    dtype: Any = jnp.bfloat16
    fixed: Mapping[str, Any] = {}
    data: Mapping[str, jax.ShapeDtypeStruct] = {}


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _alibi(score, batch, head, q_index, kv_index):
    """Linear biases (Press et al. 2022, arXiv 2108.12409), slopes of 8 heads."""
    return score - jnp.exp2(-(head + 1.0)) * (q_index - kv_index)


def _documents() -> Any:
    return masks.document(np.repeat(np.arange(8), [512, 100, 1436, 2048, 4, 1000, 1044, 2048]))


def _chosen() -> jax.ShapeDtypeStruct:
    """16 blocks of 128 keys for every block of 128 queries and key head, as in natively trained sparse attention (Yuan et al.
    2025, arXiv 2502.11089)."""
    return _ints(1, 2, 128, 16)


SHAPES: dict[str, Shape] = {
    "causal 8k": Shape(1, 8192, 8192, 8, 2, 128, masks.causal),
    "causal 2k, small heads": Shape(8, 2048, 2048, 16, 16, 64, masks.causal),
    "causal 2k float32": Shape(2, 2048, 2048, 4, 4, 64, masks.causal, jnp.float32),
    "window 1024 at 32k": Shape(1, 32768, 32768, 8, 2, 128, lambda: masks.window(1023, 0)),
    "bigbird 16k": Shape(1, 16384, 16384, 4, 4, 64, lambda: masks.bigbird(0, 64, 16384)),
    "strided 8k": Shape(1, 8192, 8192, 4, 4, 128, lambda: masks.causal() & (masks.window(512, 0) | masks.strided(512))),
    "documents 8k": Shape(1, 8192, 8192, 8, 2, 128, lambda: masks.causal() & _documents()),
    "segments 8k": Shape(2, 8192, 8192, 8, 2, 128, masks.causal, data={"segment_ids": _ints(2, 8192)}),
    "selected 16k": Shape(1, 16384, 16384, 8, 2, 128, masks.causal, data={"index": _chosen()}),
    "softcap and sinks 4k": Shape(
        1, 4096, 4096, 8, 8, 256, lambda: masks.window(1023, 0), fixed={"softcap": 50.0},
        data={"sinks": jax.ShapeDtypeStruct((8,), jnp.float32)},
    ),
    "score_mod 4k": Shape(1, 4096, 4096, 8, 8, 128, masks.causal, fixed={"score_mod": _alibi}),
    "two head dims 4k": Shape(1, 4096, 4096, 16, 16, 192, masks.causal),
    "decode 32k": Shape(8, 1, 32768, 8, 2, 128, masks.causal, data={"q_offset": _ints(8)}),
}  # fmt: skip
VALUE_DIM = {"two head dims 4k": 128}  # where it is not that of the keys
FORWARD_ONLY = ("decode 32k",)


def build(name: str, implementation: str, backward: bool, through: Literal["mosaic", "triton"] | None = None) -> Build:
    """What a `Case` needs: a function of the operands, and their shapes. through: of "gpu", instead of what it would choose."""

    def made() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        shape = SHAPES[name]
        mask = shape.mask()
        d_v = VALUE_DIM.get(name, shape.head_dim)
        sizes = [
            (shape.batch, shape.q_len, shape.q_heads, shape.head_dim),
            (shape.batch, shape.kv_len, shape.kv_heads, shape.head_dim),
            (shape.batch, shape.kv_len, shape.kv_heads, d_v),
        ]
        operands = tuple(jax.ShapeDtypeStruct(size, shape.dtype) for size in sizes)

        def forward(q, k, v, data):
            data = dict(data)
            chosen = SelectedBlocks(data.pop("index"), 128, 128, mask) if "index" in data else mask
            if through is not None:
                return _through(through, q, k, v, chosen, **shape.fixed, **data)
            return sparse_attention(q, k, v, chosen, implementation=implementation, return_lse=True, **shape.fixed, **data)

        def both(q, k, v, data, cotangents):
            real = {name: x for name, x in data.items() if jnp.issubdtype(x.dtype, jnp.floating)}
            whole = {name: x for name, x in data.items() if name not in real}
            out, pull = jax.vjp(lambda q, k, v, real: forward(q, k, v, {**whole, **real}), q, k, v, real)
            return out, pull(cotangents)

        if not backward:
            return forward, (*operands, shape.data)
        cotangents = (
            jax.ShapeDtypeStruct((*sizes[0][:3], d_v), shape.dtype),
            jax.ShapeDtypeStruct(sizes[0][:3], jnp.float32),
        )
        return both, (*operands, shape.data, cotangents)

    return made


def _through(through, q, k, v, mask, *, q_offset=0, score_mod=None, segment_ids=None, sinks=None, softcap=None):
    segments = None if segment_ids is None else Segments(segment_ids, segment_ids)
    return gpu.attend(
        q, k, v, mask, q_offset=q_offset, score_mod=score_mod, segment_ids=segments, sinks=sinks, softcap=softcap,
        scale=q.shape[3] ** -0.5, through=through,
    )  # fmt: skip


def cases(implementation: str) -> list[Case]:
    """Every shape, forward, and forward and backward."""
    return [
        Case("attention", f"{name}, {words} ({implementation})", implementation, build(name, implementation, backward))
        for name in SHAPES
        for backward, words in ((False, "forward"), (True, "both"))
        if not (backward and name in FORWARD_ONLY)
    ]


TPU_CASES = cases("tpu")
ON_HOPPER = ("causal 8k", "causal 2k, small heads", "window 1024 at 32k", "strided 8k", "selected 16k")  # what its kernel has
WITHOUT = {"A100": "wgmma and TMA are from sm_90 on", "B200": "sm_100 has tcgen05 in place of wgmma; not written"}
GPU_CASES = [
    Case(
        "attention", f"{name}, {words} (gpu, {through})", "gpu", build(name, "gpu", backward, through),
        WITHOUT if through == "mosaic" else {},
    )
    for through in ("mosaic", "triton")
    for name in (ON_HOPPER if through == "mosaic" else SHAPES)
    for backward, words in ((False, "forward"), (True, "both"))
    if not (backward and name in FORWARD_ONLY)
]  # fmt: skip

CASES = TPU_CASES + GPU_CASES
