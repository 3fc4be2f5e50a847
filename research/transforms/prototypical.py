"""Classes as the means of their features."""

from __future__ import annotations

import jax.numpy as jnp

from research.core.types import Array, Example, Task, Variables
from research.transforms._example import small_classifier
from research.transforms._heads import head


def prototypical(task: Task, ways: int, *, method: str = "predict", support: int | None = None) -> Task:
    """Prototypical networks (Snell et al. 2017, arXiv 1703.05175, equations 1 and 2): a class is the mean of the features of
    its examples in the support, and the logits of a query are minus its squared Euclidean distances from these.

    ways: classes of an episode, numbered from 0; a query of another number makes the loss NaN. method: of the task, gives the
    features, such as "embed". Batches are {"support", "query"} of {"inputs", "targets" int32, "mask"}; `support`: rows of the
    support, the task's where None; `over_tasks(prototypical(task, ways), n)` takes n of them. Features are taken as in
    evaluation, so networks with batch statistics learn with those they have; others with normalization by group or layer are as
    in training.

    Variables are the task's own; what the method does not reach, such as a head past "embed", stays as it is. Methods: predict
    on {"support", "query": {"inputs"}} -> logits [queries, ways]. Metrics: "nll", "accuracy". A masked example of the support
    counts nothing; a class without any has the logit -1e9.

    Raises ValueError (one line): ways below 2, support below 1, a method that is not there, takes more than "inputs", or gives
    no features of each.
    """

    def classify(variables: Variables, shown_SxF: Array, labels_SxK: Array, asked_QxF: Array) -> Array:
        counts_K = labels_SxK.sum(0)
        prototypes_KxF = (labels_SxK.T @ shown_SxF) / jnp.where(counts_K > 0, counts_K, 1)[:, None]
        return -jnp.square(asked_QxF[:, None] - prototypes_KxF[None]).sum(-1)

    return head(task, ways, classify, lambda variables: variables, method=method, support=support, who="prototypical")


def example() -> Example:
    return Example(prototypical(small_classifier(batch=4), 3, support=6))
