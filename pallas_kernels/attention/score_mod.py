"""The user's function of single scores as a program, and what it closes over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr


def traced(score_mod: Callable[..., Any], dtype: Any) -> ClosedJaxpr:
    """(score, batch, head, q_index, kv_index) -> score of single ones, and the arrays it closes over as its constants. JAX
    remembers the program of a function. Raises ValueError where the result is no score."""
    index = jax.ShapeDtypeStruct((), jnp.int32)
    program = jax.make_jaxpr(score_mod)(jax.ShapeDtypeStruct((), dtype), index, index, index, index)
    if [(aval.shape, aval.dtype) for aval in program.out_avals] != [((), dtype)]:
        got = ", ".join(f"{aval.dtype}{list(aval.shape)}" for aval in program.out_avals) or "nothing"
        raise ValueError(f"score_mod: got {got} for a single score, wanted {jnp.dtype(dtype).name}[]")
    return program


def refuse_arrays(score_mod: Callable[..., Any] | None, implementation: str) -> None:
    """Raises NotImplementedError for a function that closes over arrays: a kernel has them only as arguments."""
    if score_mod is not None and traced(score_mod, jnp.float32).consts:
        raise NotImplementedError(f"score_mod: {implementation} traces it in the kernel, where it cannot close over arrays")
