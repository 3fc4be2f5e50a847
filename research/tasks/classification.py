"""Predicting one of several classes."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from research.core import metrics
from research.core.types import Aux, Method, Spec, Task
from research.nn import checks
from research.nn.functional import Functional
from research.nn.losses import cross_entropy


def classification(
    model: Functional, *, batch: int, shape: Sequence[int], label_smoothing: float, merge: dict[str, str] | None = None
) -> Task:
    """The Task of predicting a class, for a model of float32 [batch, *shape] -> logits [batch, classes].

    Batches are {"inputs": float32 [batch, *shape], "targets": int32 [batch], "mask": float32 [batch]}, 1 where an example
    counts. Loss: the masked mean of cross entropy in nats, targets smoothed by `label_smoothing`. Metrics: "nll" (unsmoothed),
    "accuracy". Methods: predict {"inputs"} -> logits. merge: see `Task.merge`; by default running statistics are averaged.
    """
    checks.positive("task.batch", batch)
    checks.fraction("task.label_smoothing", label_smoothing)

    def loss(variables, batch, key):
        logits, state = model.apply(variables, batch["inputs"], key=key, train=True)
        trained, nll = cross_entropy(logits, batch["targets"], label_smoothing=label_smoothing)
        mask = batch["mask"]
        pair = metrics.masked(trained, mask)
        hits = (jnp.argmax(logits, axis=-1) == batch["targets"]).astype(jnp.float32)
        measured = {"nll": metrics.masked(nll, mask), "accuracy": metrics.masked(hits, mask)}
        return metrics.mean(pair), Aux(state, jax.lax.stop_gradient(measured), pair[1])

    def predict(variables, inputs, key):
        return model.apply(variables, inputs["inputs"], key=key)[0]

    inputs = Spec((batch, *shape), jnp.float32, ("batch",))
    specs = {
        "inputs": inputs,
        "targets": Spec((batch,), jnp.int32, ("batch",)),
        "mask": Spec((batch,), jnp.float32, ("batch",)),
    }
    return Task(model.init, loss, {"predict": Method(predict, {"inputs": inputs})}, specs, model.axes, merge or {})
