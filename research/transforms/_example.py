"""A classifier small enough for examples and tests, with something in every group of its Variables."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from research.core.types import Aux, Batch, Key, Method, Spec, Task, Variables


def small_classifier(batch: int = 8, features: int = 3, classes: int = 3, width: int = 4) -> Task:
    """Masked cross entropy of logits [batch, classes] from a tanh layer.

    state: the running mean of the inputs ("mean"), how many examples were seen ("seen", which adds up). frozen: the scale of
    the inputs. A batch that is masked altogether has the loss 0 and leaves the state.
    """

    def init(key: Key) -> Variables:
        k_trunk, k_head = jax.random.split(key)
        trunk, head = jax.random.normal(k_trunk, (features, width)), jax.random.normal(k_head, (width, classes))
        return {
            "params": {"trunk": {"kernel": trunk}, "head": {"kernel": head, "bias": jnp.zeros(classes)}},
            "state": {"inputs": {"mean": jnp.zeros(features), "seen": jnp.zeros((), jnp.int32)}},
            "frozen": {"scale": jnp.linspace(0.5, 1.5, features)},
        }

    def predict(variables: Variables, inputs: Batch, key: Key) -> jax.Array:
        params = variables["params"]
        hidden = jnp.tanh((inputs["inputs"] * variables["frozen"]["scale"][None]) @ params["trunk"]["kernel"])
        return hidden @ params["head"]["kernel"] + params["head"]["bias"][None]

    def loss(variables: Variables, batch: Batch, key: Key):
        x, mask, old = batch["inputs"], batch["mask"], variables["state"]["inputs"]
        logits = jax.nn.log_softmax(predict(variables, batch, key))
        nll = -jnp.take_along_axis(logits, batch["targets"][:, None], axis=1)[:, 0]
        total, weight = (nll * mask).sum(), mask.sum()
        count = jnp.where(weight > 0, weight, 1)
        mean = 0.9 * old["mean"] + 0.1 * (x * mask[:, None]).sum(0) / count
        new = {"mean": jnp.where(weight > 0, mean, old["mean"]), "seen": old["seen"] + (mask > 0).sum().astype(jnp.int32)}
        return total / count, Aux({"inputs": new}, {"nll": (total, weight)}, weight)

    inputs = Spec((batch, features), jnp.float32, ("batch", "features"))
    axes = {
        "params": {"trunk": {"kernel": jax.P(None, "embed")}, "head": {"kernel": jax.P("embed"), "bias": jax.P()}},
        "state": {"inputs": {"mean": jax.P(), "seen": jax.P()}},
        "frozen": {"scale": jax.P()},
    }
    each = {"targets": Spec((batch,), jnp.int32, ("batch",)), "mask": Spec((batch,), jnp.float32, ("batch",))}
    methods = {"predict": Method(predict, {"inputs": inputs})}
    return Task(init, loss, methods, {"inputs": inputs, **each}, axes, {"inputs/seen": "sum"})
