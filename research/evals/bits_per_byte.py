"""How well a language model compresses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from research.core.types import Batch, Evaluator, Example, Key, Tree, Variables
from research.evals import _sums as sums
from research.evals import _values
from research.evals._example import linear_classifier


def bits_per_byte(
    apply: sums.Apply,
    *,
    bytes_per_token: float | Sequence[float] | np.ndarray = 1.0,
    nll: _values.Values = _values.nll,
    inputs: Sequence[str] = ("inputs",),
    mask: str = "mask",
) -> Evaluator:
    """{"bits_per_byte", "nll", "perplexity"} of the tokens that batch[mask] counts.

        nll            sum of mask * -ln p(target) / sum of mask, nats a token
        perplexity     e^nll
        bits_per_byte  sum of mask * -log2 p(target) / scored bytes

    apply: gives logits [batch, length, vocab]; see `mean` for it, inputs and mask. bytes_per_token: bytes that each token
    id stands for, [vocab], or one number for all: 1 for a byte-level model, or the bytes of a text over its tokens, which
    is exact where all of them are scored. nll: function of (outputs, batch) -> nats of each token, for outputs that are
    not logits.
    """
    table = np.asarray(bytes_per_token, np.float32)
    if table.ndim > 1 or not np.all(np.isfinite(table)) or np.any(table < 0) or not np.any(table > 0):
        given = f"{bytes_per_token}" if table.ndim == 0 else f"an array {table.shape}"
        raise ValueError(f"bits_per_byte: bytes_per_token={given}; allowed: a number or [vocab], 0 or more, not all 0")

    def init() -> Tree:
        return {"nll": sums.zero(), "tokens": sums.zero(), "bytes": sums.zero()}

    def update(stats: Tree, variables: Variables, batch: Batch, key: Key) -> Tree:
        weights, targets = sums.taken(batch, mask, "targets")
        nats, tokens = sums.masked_sums(nll(sums.outputs(apply, inputs, variables, batch, key), batch), weights)
        each = jnp.asarray(table)[targets] if table.ndim else jnp.full(targets.shape, table)
        new = {"nll": nats, "tokens": tokens, "bytes": sums.masked_sums(each, weights)[0]}
        return {name: sums.plus(stats[name], x) for name, x in new.items()}

    def finalize(stats: Tree) -> Mapping[str, Any]:
        nats, tokens, scored = (sums.value(stats[name]) for name in ("nll", "tokens", "bytes"))
        mean = sums.ratio(nats, tokens)
        with np.errstate(over="ignore"):
            found = {"bits_per_byte": sums.ratio(nats, scored * math.log(2)), "nll": mean, "perplexity": np.exp(mean)}
        return {name: float(x) for name, x in found.items()}

    return Evaluator(init, update, finalize)


def example() -> Example:
    task = linear_classifier()
    return Example(bits_per_byte(task.methods["predict"].apply, bytes_per_token=[1, 2, 3]), task)
