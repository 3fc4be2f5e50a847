"""Predicting one of several classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from research.core.types import Example, Method, Spec, Task
from research.models.mlp import mlp
from research.nn import checks
from research.nn.functional import Functional
from research.nn.losses import cross_entropy
from research.tasks._supervised import masked_loss, predicting


def classification(
    model: Functional, *, batch: int, shape: Sequence[int], label_smoothing: float, merge: Mapping[str, str] | None = None
) -> Task:
    """The Task of predicting a class, for a model of float32 [batch, *shape] -> logits [batch, classes].

    Batches are {"inputs": float32 [batch, *shape], "targets": int32 [batch], "mask": float32 [batch]}, 1 where an example
    counts. Loss: the masked mean of cross entropy in nats, targets smoothed by `label_smoothing`. Metrics: "nll" (unsmoothed),
    "accuracy". Methods: predict {"inputs"} -> logits; embed {"inputs"} -> what the output layer reads, [batch, width]. merge:
    see `Task.merge`; by default running statistics are averaged.
    """
    checks.positive("task.batch", batch)
    checks.fraction("task.label_smoothing", label_smoothing)

    def per_example(logits, batch):
        loss, nll = cross_entropy(logits, batch["targets"], label_smoothing=label_smoothing)
        return loss, {"nll": nll, "accuracy": jnp.argmax(logits, axis=-1) == batch["targets"]}

    inputs = Spec((batch, *shape), jnp.float32, ("batch",))
    each = {"targets": Spec((batch,), jnp.int32, ("batch",)), "mask": Spec((batch,), jnp.float32, ("batch",))}
    methods = {
        "predict": Method(predicting(model), {"inputs": inputs}),
        "embed": Method(predicting(model, "hidden"), {"inputs": inputs}),
    }
    return Task(model.init, masked_loss(model, per_example), methods, {"inputs": inputs, **each}, model.axes, merge or {})


def example() -> Example:
    model = mlp(
        shape=[3], outputs=2, hidden=[4], activation="tanh", residual=False, dropout=0.0, init="normal", dtype="float32"
    )
    return Example(classification(model, batch=4, shape=[3], label_smoothing=0.1))
