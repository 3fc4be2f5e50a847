"""Which classes are taken for which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from research.core.types import Batch, Evaluator, Example, Key, Tree, Variables
from research.evals import _sums as sums
from research.evals._example import linear_classifier


def confusion_matrix(apply: sums.Apply, classes: int, *, inputs: Sequence[str] = ("inputs",), mask: str = "mask") -> Evaluator:
    """Counts of (target, predicted class), weighted by batch[mask], and what follows from them.

        confusion_matrix   float64 [classes, classes], rows are targets, columns argmax of the logits
        recall, precision  float64 [classes]; NaN for a class that is never a target, or never predicted
        balanced_accuracy  mean recall of the classes that are targets
        macro_f1           mean over the same classes of 2 hits / (targets + predictions)

    See `mean` for apply, inputs and mask. Raises ValueError for classes below 2, and in `finalize` where a counted target is
    none of 0 … classes - 1, or the method gives another number of logits.
    """
    if classes < 2:
        raise ValueError(f"confusion_matrix: classes={classes}; allowed: 2 or more")

    def init() -> Tree:
        return {"counts": sums.zero((classes, classes)), "weight": sums.zero()}

    def update(stats: Tree, variables: Variables, batch: Batch, key: Key) -> Tree:
        targets, weights = (x.reshape(-1) for x in sums.taken(batch, "targets", mask))
        logits = sums.outputs(apply, inputs, variables, batch, key)
        if logits.shape[-1] != classes:
            raise ValueError(f"confusion_matrix: classes={classes}, but the method gives {logits.shape[-1]} logits")
        predicted = jnp.argmax(logits, axis=-1).reshape(-1)
        within = jnp.where((targets >= 0) & (targets < classes), weights, 0.0)  # a negative index would wrap around
        counts = jnp.zeros((classes, classes), jnp.float32).at[targets, predicted].add(within, mode="drop")
        return {"counts": sums.plus(stats["counts"], counts), "weight": sums.plus(stats["weight"], sums.pairwise(weights))}

    def finalize(stats: Tree) -> Mapping[str, Any]:
        counts, weight = sums.value(stats["counts"]), sums.value(stats["weight"])
        if not np.isclose(counts.sum(), weight, rtol=1e-5):
            raise ValueError(f"confusion_matrix: targets of weight {weight - counts.sum():g} are none of 0 to {classes - 1}")
        hits, targets, predictions = np.diag(counts), counts.sum(1), counts.sum(0)
        seen = targets > 0
        recall, f1 = sums.ratio(hits, targets), sums.ratio(2 * hits, targets + predictions)
        return {
            "confusion_matrix": counts,
            "recall": recall,
            "precision": sums.ratio(hits, predictions),
            "balanced_accuracy": float(sums.ratio(recall[seen].sum(), seen.sum())),
            "macro_f1": float(sums.ratio(f1[seen].sum(), seen.sum())),
        }

    return Evaluator(init, update, finalize)


def example() -> Example:
    task = linear_classifier()
    return Example(confusion_matrix(task.methods["predict"].apply, 3), task)
