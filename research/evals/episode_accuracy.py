"""How many queries of few-shot episodes are answered rightly, with the interval over episodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.core.types import Array, Batch, Evaluator, Example, Key, Spec, Tree, Variables
from research.evals import _sums as sums
from research.evals._example import linear_classifier

Apply = Callable[[Variables, Tree, Key], Array]
NORMAL = 1.959964  # the 97.5% quantile


def episode_accuracy(apply: Apply) -> Evaluator:
    """{"accuracy": the mean over episodes of each one's share of queries answered rightly, "accuracy_interval": half the width
    of its 95% interval, 1.96 deviations over the root of the number of episodes, as few-shot papers give it, "episodes"}.

    apply: (variables, {"support": {"inputs", "targets", "mask"}, "query": {"inputs"}}, key) -> logits [episodes, queries,
    ways], every leaf with a first axis of episodes, such as the "predict" of `over_tasks(prototypical(task, ways), n)`, or
    `nearest_neighbour`, which learns nothing. Queries count by their mask; an episode whose queries are all masked does not.
    The interval is NaN for fewer than two episodes.
    """

    def init() -> Tree:
        return {name: sums.zero() for name in ("episodes", "shares", "squares")}

    def update(stats: Tree, variables: Variables, batch: Batch, key: Key) -> Tree:
        query = batch["query"]
        logits = apply(variables, {"support": batch["support"], "query": {"inputs": query["inputs"]}}, key)
        mask = query["mask"].astype(jnp.float32)
        weights = mask.sum(1)
        right = (mask * (jnp.argmax(logits, -1) == query["targets"])).sum(1)
        shares = right / jnp.where(weights > 0, weights, 1)
        counts = (weights > 0).astype(jnp.float32)
        found = {"episodes": counts, "shares": shares, "squares": shares**2}
        return {name: sums.plus(stats[name], sums.pairwise(x)) for name, x in found.items()}

    def finalize(stats: Tree) -> Mapping[str, Any]:
        n, total, squares = (float(sums.value(stats[name])) for name in ("episodes", "shares", "squares"))
        mean = total / n if n else np.nan
        variance = max(squares - n * mean**2, 0.0) / (n - 1) if n > 1 else np.nan
        return {"accuracy": mean, "accuracy_interval": NORMAL * (variance / n) ** 0.5 if n > 1 else np.nan, "episodes": n}

    return Evaluator(init, update, finalize)


def nearest_neighbour(ways: int) -> Apply:
    """What `episode_accuracy` may measure without learning anything: the class of the example of the support whose inputs, such
    as pixels, are nearest in Euclidean distance. Logits are 1 for it, else 0."""

    def apply(variables: Variables, inputs: Tree, key: Key) -> Array:
        def one(shown: Batch, asked: Array) -> Array:
            x_SxF, q_QxF = (x.reshape(len(x), -1) for x in (shown["inputs"], asked))
            far_QxS = jnp.square(x_SxF).sum(1)[None] - 2 * q_QxF @ x_SxF.T  # less the query's own square, the same for all
            far_QxS = jnp.where(shown["mask"][None] > 0, far_QxS, jnp.inf)
            return jax.nn.one_hot(shown["targets"][jnp.argmin(far_QxS, 1)], ways)

        return jax.vmap(one)(inputs["support"], inputs["query"]["inputs"])

    return apply


def example() -> Example:
    def part(rows: int) -> Tree:
        each = {"targets": Spec((4, rows), jnp.int32, ("batch",)), "mask": Spec((4, rows), jnp.float32, ("batch",))}
        return {"inputs": Spec((4, rows, 3), jnp.float32, ("batch",)), **each}

    task = linear_classifier()._replace(batch={"support": part(6), "query": part(5)})
    return Example(episode_accuracy(nearest_neighbour(3)), task)
