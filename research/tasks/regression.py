"""Predicting numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from research.core.types import Example, Method, Spec, Task
from research.models.mlp import mlp
from research.nn import checks
from research.nn.functional import Functional
from research.tasks._supervised import masked_loss, predicting


def regression(
    model: Functional, *, batch: int, shape: Sequence[int], outputs: int, merge: Mapping[str, str] | None = None
) -> Task:
    """The Task of predicting numbers, for a model of float32 [batch, *shape] -> [batch, outputs].

    Batches are {"inputs": float32 [batch, *shape], "targets": float32 [batch, outputs], "mask": float32 [batch]}, 1 where an
    example counts. Loss: the masked mean over examples of the squared error, averaged over outputs. Metrics: "mse", the same,
    and "mae", the absolute error. Methods: predict {"inputs"} -> [batch, outputs]; embed -> what the output layer reads,
    [batch, width].
    """
    checks.positive("task.batch", batch)
    checks.positive("task.outputs", outputs)

    def per_example(predicted, batch):
        error = predicted - batch["targets"]
        squared = jnp.mean(jnp.square(error), axis=-1)
        return squared, {"mse": squared, "mae": jnp.mean(jnp.abs(error), axis=-1)}

    inputs = Spec((batch, *shape), jnp.float32, ("batch",))
    specs = {
        "inputs": inputs,
        "targets": Spec((batch, outputs), jnp.float32, ("batch",)),
        "mask": Spec((batch,), jnp.float32, ("batch",)),
    }
    methods = {
        "predict": Method(predicting(model), {"inputs": inputs}),
        "embed": Method(predicting(model, "hidden"), {"inputs": inputs}),
    }
    return Task(model.init, masked_loss(model, per_example), methods, specs, model.axes, merge or {})


def example() -> Example:
    model = mlp(
        shape=[3], outputs=2, hidden=[4], activation="tanh", residual=False, dropout=0.0, init="normal", dtype="float32"
    )
    return Example(regression(model, batch=4, shape=[3], outputs=2))
