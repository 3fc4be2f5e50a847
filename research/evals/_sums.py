"""Sums that hold over millions of terms, in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from research.core.types import Array, Batch, Key, Tree, Variables

Apply = Callable[[Variables, Tree, Key], Tree]
Sum = dict[str, Array]


def zero(shape: Sequence[int] = ()) -> Sum:
    """A running sum: float32 "high", and "low", what rounding left over. Two sums add up leaf by leaf."""
    return {"high": jnp.zeros(shape, jnp.float32), "low": jnp.zeros(shape, jnp.float32)}


def plus(total: Sum, x: Array) -> Sum:
    """total + x without loss (Knuth 1969, volume 2, section 4.2.2, theorem B): one rounding error a batch would grow with
    their number."""
    high = total["high"] + x
    taken = high - total["high"]
    lost = (total["high"] - (high - taken)) + (x - taken)
    return {"high": high, "low": total["low"] + lost}


def value(total: Sum) -> np.ndarray:
    """The sum on the host, float64."""
    return np.asarray(total["high"], np.float64) + np.asarray(total["low"], np.float64)


def ratio(total: Any, weight: Any) -> np.ndarray:
    """total / weight; NaN where there is no weight."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.asarray(weight) == 0, np.nan, np.asarray(total, np.float64) / np.asarray(weight, np.float64))


def pairwise(x: Array) -> Array:
    """The sum over the first axis, by halves: rounding grows with the logarithm of its length."""
    while x.shape[0] > 1:
        if x.shape[0] % 2:
            x = jnp.concatenate([x, jnp.zeros_like(x[:1])])
        x = x[: x.shape[0] // 2] + x[x.shape[0] // 2 :]
    return x.sum(0)


def masked_rows(values: Array, mask: Array) -> tuple[Array, Array]:
    """(sums, weights) of each row, float32 [batch], of values [batch, ...] under a mask whose shape the values' begins
    with. What is masked counts exactly 0, NaN included.

    Raises ValueError where the shapes do not fit.
    """
    if values.shape[: mask.ndim] != mask.shape:
        raise ValueError(f"evaluator: values {values.shape} do not begin with the shape of the mask, {mask.shape}")
    column = mask.astype(jnp.float32).reshape(mask.shape + (1,) * (values.ndim - mask.ndim))
    weights = jnp.broadcast_to(column, values.shape)
    kept = jnp.where(weights != 0, values.astype(jnp.float32) * weights, 0.0)
    rows = values.shape[0]
    return pairwise(kept.reshape(rows, -1).T), pairwise(weights.reshape(rows, -1).T)


def masked_sums(values: Array, mask: Array) -> tuple[Array, Array]:
    """(sum, weight), float32 scalars, as `masked_rows`."""
    total, weight = masked_rows(values, mask)
    return pairwise(total), pairwise(weight)


def taken(batch: Batch, *names: str) -> list[Array]:
    """`batch[name]` of each. Raises ValueError (one line) where the batch has no such key."""
    for name in names:
        if not isinstance(batch, Mapping) or name not in batch:
            has = ", ".join(batch) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            raise ValueError(f"evaluator: the batch has no {name!r}; it has: {has}")
    return [batch[name] for name in names]


def outputs(apply: Apply, inputs: Sequence[str], variables: Variables, batch: Batch, key: Key) -> Tree:
    """What a method gives for the batch's `inputs`."""
    return apply(variables, dict(zip(inputs, taken(batch, *inputs), strict=True)), key)


def on_host(x: np.ndarray) -> float | np.ndarray:
    """A float where there is one number."""
    return float(x) if np.ndim(x) == 0 else np.asarray(x)


def added(stats: Mapping[str, Any], new: Mapping[str, tuple[Array, Array]]) -> dict[str, Any]:
    """Stats {name: {"sum", "weight"}} with the pairs of one more batch."""
    return {n: {"sum": plus(stats[n]["sum"], total), "weight": plus(stats[n]["weight"], w)} for n, (total, w) in new.items()}


def means(stats: Mapping[str, Any]) -> dict[str, Any]:
    """{name: sum / weight} on the host."""
    return {name: on_host(ratio(value(s["sum"]), value(s["weight"]))) for name, s in stats.items()}
