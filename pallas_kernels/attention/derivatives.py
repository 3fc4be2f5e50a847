"""Derivatives that an implementation does not have, refused by name instead of by what fails first within JAX."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def _refuse_forward(*_: Any, implementation: str) -> NoReturn:
    raise NotImplementedError(
        f"implementation: {implementation!r} has no forward mode (jax.jvp, jax.jacfwd); use reverse mode (jax.grad, jax.vjp) "
        "or implementation='reference'"
    )


# Tangents as they are. Reverse mode transposes it, and nobody computes it; forward mode would have to.
reverse_only_p = Primitive("reverse_mode_only")
reverse_only_p.multiple_results = True
reverse_only_p.def_impl(_refuse_forward)
reverse_only_p.def_abstract_eval(lambda *tangents, implementation: list(tangents))
mlir.register_lowering(reverse_only_p, lambda _, *tangents, implementation: _refuse_forward(implementation=implementation))
ad.primitive_transposes[reverse_only_p] = lambda cotangents, *_, implementation: cotangents
batching.primitive_batchers[reverse_only_p] = lambda args, dims, **params: (reverse_only_p.bind(*args, **params), dims)


@functools.partial(ad.primitive_jvps.__setitem__, reverse_only_p)
def _linear(primals: Any, tangents: Any, **params: Any) -> Any:
    tangents = [ad.instantiate_zeros(tangent) for tangent in tangents]
    return reverse_only_p.bind(*primals, **params), reverse_only_p.bind(*tangents, **params)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def reverse_only(implementation: str, tree: Any) -> Any:
    """The tree of arrays as it is. Forward mode through it raises NotImplementedError, when it is computed or compiled."""
    return tree


@reverse_only.defjvp
def _reverse_only_jvp(implementation: str, primals: Any, tangents: Any) -> Any:
    leaves, structure = jax.tree.flatten(tangents[0])  # all in one: reverse mode may know some of them, but not all
    return primals[0], structure.unflatten(reverse_only_p.bind(*leaves, implementation=implementation))


@contextlib.contextmanager
def in_words(implementation: str) -> Iterator[None]:
    """Around what is behind `reverse_only`: for forward mode of several directions (jax.jacfwd), at which JAX fails before
    anything is computed or compiled."""
    try:
        yield
    except TypeError as error:
        if "forward-mode autodiff" not in str(error):
            raise
        _refuse_forward(implementation=implementation)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def once(implementation: str, tree: Any) -> Any:
    """The tree of arrays as it is. What derivatives are computed from is passed through it: to differentiate these in turn
    raises NotImplementedError."""
    return tree


@once.defjvp
def _once_jvp(implementation: str, primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        f"implementation: {implementation!r} has first derivatives only; for others use implementation='xla' or 'reference'"
    )
