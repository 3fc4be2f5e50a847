"""The area under the receiver operating characteristic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.core.types import Array, Batch, Evaluator, Example, Key, Tree, Variables
from research.evals import _sums as sums
from research.evals._example import linear_classifier


def log_odds(logits: Array) -> Array:
    """log p / (1 - p) of each class, float32 [..., classes]: ordered as softmax is, without its ties near 0 and 1."""
    logits = logits.astype(jnp.float32)
    normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    likeliest = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=bool)
    rest = jax.nn.logsumexp(jnp.where(likeliest, -jnp.inf, logits), axis=-1, keepdims=True)
    # all but the likeliest have p of at most 1/2, where 1 - p does not cancel
    others = normalizer + jnp.log1p(-jnp.minimum(jnp.exp(logits - normalizer), 0.5))
    return logits - jnp.where(likeliest, rest, others)


def bin_of(scores: Array, bits: int) -> Array:
    """int32 in [0, 2^bits): the first `bits` of a float32, in an order that is that of the numbers. Below infinity a
    bin's ends differ by 2^-(bits - 9) of their size: 1/128 for 16 bits."""
    scores = jnp.where(scores == 0, 0.0, scores.astype(jnp.float32))  # -0.0 is 0.0
    raw = jax.lax.bitcast_convert_type(scores, jnp.uint32)
    ordered = jnp.where(raw >> 31 == 1, ~raw, raw | jnp.uint32(1 << 31))
    return (ordered >> (32 - bits)).astype(jnp.int32)


def area(positive: np.ndarray, negative: np.ndarray) -> tuple[float, float]:
    """(area, bound of its error) of two histograms over the same bins [bins]: the chance that a positive scores above a
    negative, ties and pairs within a bin counting one half, which errs by at most half the share of such pairs."""
    pairs = positive.sum() * negative.sum()
    below = np.cumsum(negative) - negative
    return float(sums.ratio((positive * (below + negative / 2)).sum(), pairs)), float(
        sums.ratio((positive * negative).sum() / 2, pairs)
    )


def auc(
    apply: sums.Apply, classes: int = 2, *, bits: int = 16, inputs: Sequence[str] = ("inputs",), mask: str = "mask"
) -> Evaluator:
    """{"auc", "auc_error"}: the area under the ROC curve, weighted by batch[mask], and a bound of what its bins add to
    its error.

    The method gives logits [..., classes], or for two classes one score [...] of class 1; batch["targets"] are int [...].
    Of more than two classes each is ranked against the rest by its log odds: "auc_per_class", float64 [classes], NaN
    where all targets are of one kind, and "auc" is the mean over the others.

    Scores are counted in 2^bits bins, float32, over all real numbers (see `bin_of`), so that stats add up over shards:
    the area is exact where no positive shares a bin with a negative of another score. A bin counts exactly up to 2^24.
    NaN scores make it NaN.

    Raises ValueError: classes below 2, bits not in 10 … 24, outputs that do not fit.
    """
    if classes < 2:
        raise ValueError(f"auc: classes={classes}; allowed: 2 or more")
    if not 10 <= bits <= 24:
        raise ValueError(f"auc: bits={bits}; allowed: 10 to 24")
    ranked = 1 if classes == 2 else classes

    def scores(outputs: Array, targets: Array) -> Array:
        if outputs.shape == targets.shape and classes == 2:
            return outputs.reshape(-1, 1)
        if outputs.shape != (*targets.shape, classes):
            raise ValueError(f"auc: outputs {outputs.shape} for targets {targets.shape}; expected {(*targets.shape, classes)}")
        return (log_odds(outputs)[..., 1:] if classes == 2 else log_odds(outputs)).reshape(-1, ranked)

    def init() -> Tree:
        return {"counts": jnp.zeros((ranked, 2, 2**bits), jnp.float32), "invalid": jnp.zeros(ranked, jnp.float32)}

    def update(stats: Tree, variables: Variables, batch: Batch, key: Key) -> Tree:
        targets, weights = sums.taken(batch, "targets", mask)
        s_NxR = scores(sums.outputs(apply, inputs, variables, batch, key), targets)
        classes_R = jnp.arange(ranked) + (1 if classes == 2 else 0)
        positive_NxR = (targets.reshape(-1, 1) == classes_R[None]).astype(jnp.int32)
        w_NxR = jnp.broadcast_to(weights.reshape(-1, 1).astype(jnp.float32), s_NxR.shape)
        index = (jnp.broadcast_to(jnp.arange(ranked)[None], s_NxR.shape), positive_NxR, bin_of(s_NxR, bits))
        invalid = jnp.where(jnp.isnan(s_NxR), w_NxR, 0.0).sum(0)
        return {"counts": stats["counts"].at[index].add(w_NxR), "invalid": stats["invalid"] + invalid}

    def finalize(stats: Tree) -> Mapping[str, Any]:
        counts, invalid = np.asarray(stats["counts"], np.float64), np.asarray(stats["invalid"])
        each = np.array([area(counts[r, 1], counts[r, 0]) if invalid[r] == 0 else (np.nan, np.nan) for r in range(ranked)])
        both = (counts.sum(2) > 0).all(1)
        mean, error = (float(sums.ratio(each[both, i].sum(), both.sum())) for i in (0, 1))
        found = {"auc": mean, "auc_error": error}
        return found if classes == 2 else {**found, "auc_per_class": each[:, 0]}

    return Evaluator(init, update, finalize)


def example() -> Example:
    task = linear_classifier()
    return Example(auc(task.methods["predict"].apply, 3, bits=12), task)
