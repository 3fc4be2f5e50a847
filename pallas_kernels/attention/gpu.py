"""Block-sparse attention for NVIDIA GPUs: which of the two kernels a call gets.

| | `gpu_hopper` (Mosaic GPU: TMA, wgmma) | `gpu_triton` (Pallas-Triton) |
| --- | --- | --- |
| devices | compute capability 9.0 | A100 on, B200 too |
| passes | forward; the backward pass is Triton's | both |
| dtypes | bfloat16, float16 | and float32, by three passes of tf32 |
| head dimensions | 64, 128 | up to 512 bytes: 256 in bfloat16, 128 in float32 |
| masks | by index arithmetic | and those that look at arrays, as bitmaps of their partial blocks |
| not in it | score_mod, segments, fewer than 64 queries | score_mod that closes over arrays, float64 |

On a Hopper device a call goes through the first where that supports it, which is logged once; all else through the second.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import jax

from pallas_kernels import dispatch
from pallas_kernels.attention import gpu_hopper, gpu_triton

HOPPER = re.compile(r"\bG?H\d{2,3}\b")  # H100, H200, H20, H800, GH200: what their device_kind says


def attend(
    q,
    k,
    v,
    mask,
    *,
    q_offset,
    score_mod,
    segment_ids,
    sinks,
    softcap,
    scale,
    through: Literal["mosaic", "triton"] | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """As `reference.attend`.

    through: the kernel to take; None chooses by the device that is compiled for: that of the mesh in use, otherwise of the
        default backend (Triton where neither is a GPU). A named one never falls back.
    interpret: True for Triton's kernels on a CPU; for "mosaic" the interpreter's parameters, InterpretGPUParams.
    """
    arguments = {
        "q_offset": q_offset, "score_mod": score_mod, "segment_ids": segment_ids, "sinks": sinks, "softcap": softcap,
        "scale": scale, "interpret": interpret,
    }  # fmt: skip
    if through not in (None, "mosaic", "triton"):
        raise ValueError(f"through={through!r}; allowed: None, 'mosaic', 'triton'")
    if through == "mosaic" or (through is None and not interpret and on_hopper()):
        try:
            result = gpu_hopper.attend(q, k, v, mask, **arguments)
        except NotImplementedError as error:
            if through == "mosaic":
                raise
            dispatch.log_once(f"sparse_attention on Hopper: both passes through Pallas-Triton ({error})")
        else:
            dispatch.log_once(
                "sparse_attention on Hopper: forward pass through Mosaic GPU; backward pass, where one is asked for, through "
                "Pallas-Triton"
            )
            return result
    return gpu_triton.attend(q, k, v, mask, **arguments)


def on_hopper() -> bool:
    """Whether what is compiled for has compute capability 9.0."""
    return bool(HOPPER.search(dispatch.device_kind()))
