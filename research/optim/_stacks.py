"""The same function of many matrices: those of equal shape are stacked, and compiled once.

Where a mesh lays "matrices" over some of its axes, each device computes its own matrices of a stack: every matrix goes whole to
one device and its result back, once, however many products are made of it. A stack that does not divide is filled with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from research.core.mesh import axes_of, constrained, size_of
from research.core.types import Array, Tree

Function = Callable[..., Array]
NAME = "matrices"


def at_once_here(at_once: int | None) -> int:
    """How many matrices go through one batched product; None is all on an accelerator, 1 on a CPU, whose cache holds one
    better."""
    return at_once if at_once is not None else 1 if jax.default_backend() == "cpu" else 2**31


def _each(f: Function, stacks: Sequence[Array], at_once: int) -> Tree:
    if at_once >= stacks[0].shape[0]:
        return jax.vmap(f)(*stacks)
    return jax.lax.map(lambda xs: f(*xs), tuple(stacks), batch_size=at_once if at_once > 1 else None)


def over_stack(f: Function, stacks: Sequence[Array], at_once: int) -> Tree:
    """`f(*matrices)` of the matrices [n, ...] of each stack, as results [n, ...]."""
    n, over = stacks[0].shape[0], axes_of(NAME)
    parts = size_of(over)
    if parts == 1:
        return _each(f, stacks, at_once)
    rows = -(-n // parts)

    def whole(x: Array) -> Array:
        """Along one mesh axis matrices go all to all. Along several the compiler would not see that, and warns at length before
        it gathers: it is told to."""
        return constrained(x, *(None,) * x.ndim) if len(over) > 1 else x

    def laid(x: Array, *names: str | None) -> Array:
        return constrained(x, NAME, *names, *(None,) * (x.ndim - 1 - len(names)))

    def dealt(x: Array) -> Array:
        filled = jnp.concatenate([x, jnp.zeros((rows * parts - n, *x.shape[1:]), x.dtype)]) if rows * parts > n else x
        return laid(laid(whole(filled)).reshape(parts, rows, *x.shape[1:]))

    made = jax.vmap(lambda *own: _each(f, own, at_once))(*map(dealt, stacks))
    return jax.tree.map(lambda y: whole(laid(laid(y).reshape(rows * parts, *y.shape[2:])))[:n], made)


def over_matrices(f: Function, groups: Sequence[Sequence[Array]], at_once: int | None = None) -> list[Tree]:
    """`f(*arguments)` for each of many groups of arguments, each argument [*batch, m, n] of its group a batch of matrices; f is
    of single matrices, and gives a tree of them. Groups whose arguments are of equal shapes but for the batch share a stack."""
    flat = [[x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:]) for x in group] for group in groups]
    alike: dict[tuple, list[int]] = {}
    for k, group in enumerate(flat):
        alike.setdefault(tuple((x.shape[1:], x.dtype) for x in group), []).append(k)
    out: list[Tree] = [None] * len(groups)
    for members in alike.values():
        stacks = [jnp.concatenate(xs) if len(xs) > 1 else xs[0] for xs in zip(*(flat[k] for k in members))]
        made, begin = over_stack(f, stacks, at_once_here(at_once)), 0
        for k in members:
            size = flat[k][0].shape[0]
            batch = groups[k][0].shape[:-2]
            out[k] = jax.tree.map(lambda y: y[begin : begin + size].reshape(*batch, *y.shape[1:]), made)  # noqa: B023
            begin += size
    return out
