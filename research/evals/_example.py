"""A classifier small enough for examples and tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from research.core.types import Aux, Batch, Key, Method, Spec, Task, Variables


def linear_classifier(batch: int = 8, features: int = 3, classes: int = 3) -> Task:
    """Softmax regression: inputs float32 [batch, features], targets int32 [batch], mask float32 [batch]."""

    def init(key: Key) -> Variables:
        return {"params": {"kernel": jax.random.normal(key, (features, classes))}, "state": {}, "frozen": {}}

    def predict(variables: Variables, inputs: Batch, key: Key) -> jax.Array:
        return inputs["inputs"] @ variables["params"]["kernel"]

    def loss(variables: Variables, batch: Batch, key: Key):
        logits = jax.nn.log_softmax(predict(variables, batch, key))
        nll = -jnp.take_along_axis(logits, batch["targets"][:, None], axis=1)[:, 0]
        total, weight = jnp.where(batch["mask"] > 0, nll * batch["mask"], 0.0).sum(), batch["mask"].sum()
        return total / jnp.where(weight > 0, weight, 1.0), Aux(variables["state"], {"nll": (total, weight)}, weight)

    inputs = Spec((batch, features), jnp.float32, ("batch", None))
    each = {"targets": Spec((batch,), jnp.int32, ("batch",)), "mask": Spec((batch,), jnp.float32, ("batch",))}
    return Task(init, loss, {"predict": Method(predict, {"inputs": inputs})}, {"inputs": inputs, **each})
