"""Users' functions of single scores and indices, as programs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr


def program_of(function: Callable[..., Any], name: str, takes: Sequence[str], args: Sequence[Any]) -> tuple[ClosedJaxpr, str]:
    """(program, what it returns in words, such as "bool[]") of a function called with ShapeDtypeStructs `args`, one for each of
    `takes`. `name` says in errors whose it is. JAX remembers the program of a function.

    Raises ValueError for a function that takes other arguments, or that needs the value of one.
    """
    try:
        inspect.signature(function).bind(*args)
    except TypeError as error:
        raise ValueError(f"{name} is called with ({', '.join(takes)}): {error}") from None
    except ValueError:  # what is built in may not tell its signature
        pass
    try:
        program, result = jax.make_jaxpr(function, return_shape=True)(*args)
    except (
        jax.errors.ConcretizationTypeError,
        jax.errors.TracerArrayConversionError,
        jax.errors.TracerIntegerConversionError,
    ) as error:
        raise ValueError(
            f"{name} needs the value of what it is called with, which are arrays: wanted &, |, ~ and jnp.where instead of and, "
            "or, not and if, and tables as jnp.asarray(table)[index]"
        ) from error
    return program, _said(result)


def _said(result: Any) -> str:
    if isinstance(result, jax.ShapeDtypeStruct):
        return f"{result.dtype}{list(result.shape)}"
    leaves = ", ".join(map(_said, jax.tree.leaves(result)))
    return "nothing" if result is None else f"{type(result).__name__} of {leaves or 'nothing'}"
