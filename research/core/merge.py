"""How parallel copies of `Variables["state"]`, one a microbatch, example or inner task, become one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from research.core.tree import Path, joined, map_with_path
from research.core.types import Array, Tree

RULES = ("mean", "max", "sum")


def _wide(dtype: Any) -> Any:
    """At least float32, so that many copies of a bfloat16 can be averaged."""
    return jnp.promote_types(dtype, jnp.float32)


def rule_of(path: Path, dtype: Any, rules: Mapping[str, str]) -> str:
    """The rule of one leaf: the named one, else "mean" for floats and "max" for integers and booleans.

    Raises ValueError (one line) for an unknown rule, the mean of integers, or a dtype that cannot be merged.
    """
    name, floating = joined(path), jnp.issubdtype(dtype, jnp.floating)
    if not (floating or jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.bool_)):
        raise ValueError(f"state {name}: copies of {dtype} cannot be merged; floats, integers and booleans can")
    rule = rules.get(name, "mean" if floating else "max")
    if rule not in RULES:
        raise ValueError(f"merge of state {name}: {rule!r} is unknown; allowed: {', '.join(RULES)}")
    if rule == "mean" and not floating:
        raise ValueError(f"merge of state {name}: {dtype} has no mean; allowed: max, sum")
    return rule


def merged(copies: Tree, weights: Array, old: Tree, rules: Mapping[str, str]) -> Tree:
    """One state from `n` copies that were each made from `old`.

    copies: leaves [n, *shape]. weights: float [n], `Aux.weight` of each copy (ones where it was None). old: leaves [*shape].
    rules: `Task.merge`, {path: "mean" | "max" | "sum"}; unnamed floats take the mean, integers and booleans the maximum.
        mean   weighted by `weights`
        max    the largest
        sum    old plus what every copy added to it
    A copy of weight 0 saw nothing and may hold NaN: it counts nowhere, and where all weights are 0 the old state stays.
    Raises ValueError as `rule_of` does.
    """
    counts, total = weights != 0, weights.sum()

    def one(path: Path, copies: Array, old: Array) -> Array:
        rule = rule_of(path, old.dtype, rules)
        column = (-1,) + (1,) * old.ndim
        seen = jnp.where(counts.reshape(column), copies, old[None])  # NaN of an empty copy goes before it meets arithmetic
        if rule == "max":
            return seen.max(0)
        if rule == "sum":
            return seen.any(0) if old.dtype == jnp.bool_ else old + (seen - old[None]).sum(0, dtype=old.dtype)
        share = weights / jnp.where(total == 0, 1, total)
        mean = (share.reshape(column) * seen.astype(_wide(old.dtype))).sum(0)
        return jnp.where(total == 0, old, mean).astype(old.dtype)

    return map_with_path(one, copies, old)
