"""The user's function of single scores as a program, and what it closes over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from pallas_kernels.attention.functions import program_of

TAKES = ("score", "batch", "head", "q_index", "kv_index")


def traced(score_mod: Callable[..., Any], dtype: Any) -> ClosedJaxpr:
    """(score, batch, head, q_index, kv_index) -> score of single ones, and the arrays it closes over as its constants. Raises
    ValueError for a function of other arguments, one that needs the value of one, or one whose result is no score."""
    index = jax.ShapeDtypeStruct((), jnp.int32)
    program, result = program_of(score_mod, "score_mod", TAKES, [jax.ShapeDtypeStruct((), dtype), *[index] * 4])
    wanted = f"{jnp.dtype(dtype).name}[]"
    if result != wanted:
        raise ValueError(f"score_mod: got {result} for a single score, wanted {wanted}")
    return program


def refuse_arrays(score_mod: Callable[..., Any] | None, implementation: str) -> None:
    """Raises NotImplementedError for a function that closes over arrays: a kernel has them only as arguments."""
    if score_mod is not None and traced(score_mod, jnp.float32).consts:
        raise NotImplementedError(f"score_mod: {implementation} traces it in the kernel, where it cannot close over arrays")
