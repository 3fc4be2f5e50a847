"""Queries answered by the examples that resemble them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from research.core.types import Array, Example, Task, Variables
from research.transforms._example import small_classifier
from research.transforms._heads import head


def matching(task: Task, ways: int, *, method: str = "predict", support: int | None = None, temperature: float = 1.0) -> Task:
    """Matching networks (Vinyals et al. 2016, arXiv 1606.04080, equations 1 and 2 with section 2.1.1): the probability of a
    class is the attention of the query to its examples in the support, a softmax over all of them of cosine similarities of
    features divided by `temperature` (1 there). Without their full context embeddings (section 2.1.2), by which each example's
    features depend on the whole support.

    Logits are logarithms of the probabilities. All else as in `prototypical`. Raises ValueError as it does, and for a
    temperature that is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"matching: temperature={temperature}; allowed: above 0")

    def classify(variables: Variables, shown_SxF: Array, labels_SxK: Array, asked_QxF: Array) -> Array:
        similar_QxS = _unit(asked_QxF) @ _unit(shown_SxF).T / temperature
        counts_SxK = jnp.where(labels_SxK > 0, labels_SxK, 1)
        each_QxSxK = jnp.where(labels_SxK[None] > 0, similar_QxS[:, :, None] + jnp.log(counts_SxK)[None], -jnp.inf)
        shown_K = labels_SxK.sum(0) > 0
        # of a class that is not shown every term is -inf, whose logsumexp has no gradient
        each_QxSxK = jnp.where(shown_K[None, None], each_QxSxK, 0)
        return jax.nn.log_softmax(jnp.where(shown_K[None], jax.nn.logsumexp(each_QxSxK, 1), -jnp.inf), -1)

    return head(task, ways, classify, lambda variables: variables, method=method, support=support, who="matching")


def _unit(x: Array) -> Array:
    """Rows of length 1; a row of zeros stays so, with a gradient of 0."""
    squares = jnp.square(x).sum(-1, keepdims=True)
    return jnp.where(squares > 0, x * jax.lax.rsqrt(jnp.where(squares > 0, squares, 1)), 0)


def example() -> Example:
    return Example(matching(small_classifier(batch=4), 3, support=6, temperature=0.5))
