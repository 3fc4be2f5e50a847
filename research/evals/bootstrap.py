"""How far a mean may be from that of another sample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.core.types import Array, Batch, Evaluator, Example, Key, Tree, Variables
from research.evals import _sums as sums
from research.evals._example import linear_classifier
from research.evals._values import Values, correct, nll

# P(Poisson(1) <= k), until nothing is left in 32 bits
POISSON = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(13)])


def fingerprint(batch: Batch, names: Sequence[str]) -> Array:
    """uint32 [batch, 2] that depends on nothing but what stands in each row of these leaves."""
    rows = jax.tree.leaves(batch[names[0]])[0].shape[0]
    total = jnp.zeros((rows, 2), jnp.uint32)
    seed = 1
    for leaf in jax.tree.leaves([batch[name] for name in names]):
        wide = leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.astype(jnp.uint32)
        bits_BxN = jax.lax.bitcast_convert_type(wide, jnp.uint32).reshape(rows, -1)
        place_N = jnp.arange(bits_BxN.shape[1], dtype=jnp.uint32)
        mixed = [_mixed(bits_BxN ^ _mixed(place_N + jnp.uint32(seed + 7919 * i))[None]) for i in (0, 1)]
        total = total + jnp.stack([m.sum(1, dtype=jnp.uint32) for m in mixed], axis=1)
        seed += 104729
    return total


def _mixed(x: Array) -> Array:
    """A uint32 whose every bit depends on every bit of x."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def poisson(key: Key, draws: int) -> Array:
    """float32 [draws] of Poisson(1), by inversion."""
    uniform = jax.random.uniform(key, (draws,))
    return (uniform[:, None] > jnp.asarray(POISSON, jnp.float32)[None]).sum(1).astype(jnp.float32)


def bootstrap(
    apply: sums.Apply,
    values: Mapping[str, Values],
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    identity: Sequence[str] = ("inputs", "targets"),
    inputs: Sequence[str] = ("inputs",),
    mask: str = "mask",
) -> Evaluator:
    """Of each name the mean as `mean` has it, "<name>_low" and "<name>_high", the percentile interval of `level` (Efron
    1979), and "<name>_std", the standard deviation of the resampled means.

    A resample counts every row of a batch (an example; of text a whole window) Poisson(1) times (Chamandy et al. 2012,
    Estimating uncertainty for massive data streams, section 3). How many times is drawn from the seed and the row's own
    content, the leaves named by `identity`, so stats add up over shards and neither batching nor padding nor order
    changes the interval. Rows that are equal are drawn together; give `identity` a number of each example where many are,
    such as ("index",).

    Raises ValueError: resamples below 2, level not between 0 and 1, and as `mean` does.
    """
    if resamples < 2:
        raise ValueError(f"bootstrap: resamples={resamples}; allowed: 2 or more")
    if not 0 < level < 1:
        raise ValueError(f"bootstrap: level={level}; allowed: above 0 and below 1")
    names = sorted(values)

    def init() -> Tree:
        return {
            name: {part: sums.zero(shape) for part, shape in
                   {"sum": (), "weight": (), "sums": (resamples,), "weights": (resamples,)}.items()}
            for name in names
        }  # fmt: skip

    def update(stats: Tree, variables: Variables, batch: Batch, key: Key) -> Tree:
        outputs = sums.outputs(apply, inputs, variables, batch, key)
        (weights,) = sums.taken(batch, mask)
        sums.taken(batch, *identity)
        start = jax.random.key(seed)
        ids_Bx2 = fingerprint(batch, identity)
        times_BxR = jax.vmap(lambda i: poisson(jax.random.fold_in(jax.random.fold_in(start, i[0]), i[1]), resamples))(ids_Bx2)
        new = {}
        for name in names:
            total_B, weight_B = sums.masked_rows(values[name](outputs, batch), weights)
            found = {
                "sum": sums.pairwise(total_B),
                "weight": sums.pairwise(weight_B),
                "sums": sums.pairwise(times_BxR * total_B[:, None]),
                "weights": sums.pairwise(times_BxR * weight_B[:, None]),
            }
            new[name] = {part: sums.plus(stats[name][part], x) for part, x in found.items()}
        return new

    def finalize(stats: Tree) -> Mapping[str, Any]:
        out: dict[str, float] = {}
        for name in names:
            s = {part: sums.value(x) for part, x in stats[name].items()}
            means = sums.ratio(s["sums"], s["weights"])
            means = means[np.isfinite(means)]  # a resample may be empty
            low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2]) if means.size else (np.nan, np.nan)
            spread = means.std(ddof=1) if means.size > 1 else np.nan
            found = {"": sums.ratio(s["sum"], s["weight"]), "_low": low, "_high": high, "_std": spread}
            out |= {f"{name}{end}": float(x) for end, x in found.items()}
        return out

    return Evaluator(init, update, finalize)


def example() -> Example:
    task = linear_classifier()
    return Example(bootstrap(task.methods["predict"].apply, {"nll": nll, "accuracy": correct()}, resamples=20), task)
