"""A task small enough for examples and tests, with something in every group of its Variables."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from research.core.types import Aux, Batch, Key, Method, Spec, Task, Variables


def linear_regression(batch: int = 8, features: int = 3) -> Task:
    """Masked least squares of targets [batch] on scaled inputs [batch, features].

    state: the running mean of the inputs ("mean"), the largest one seen ("max"), how many were seen ("sum"). frozen: the scale
    of the inputs. A batch that is masked altogether has the loss 0/0.
    """

    def init(key: Key) -> Variables:
        return {
            "params": {"linear": {"kernel": jax.random.normal(key, (features,)), "bias": jnp.zeros(())}},
            "state": {"mean": jnp.zeros(features), "largest": jnp.zeros(()), "seen": jnp.zeros((), jnp.int32)},
            "frozen": {"scale": jnp.linspace(0.5, 1.5, features)},
        }

    def predict(variables: Variables, inputs: Batch, key: Key) -> jax.Array:
        linear = variables["params"]["linear"]
        return (inputs["inputs"] * variables["frozen"]["scale"][None]) @ linear["kernel"] + linear["bias"]

    def loss(variables: Variables, batch: Batch, key: Key):
        x, mask, state = batch["inputs"], batch["mask"], variables["state"]
        errors = (predict(variables, batch, key) - batch["targets"]) ** 2
        total, weight = (errors * mask).sum(), mask.sum()
        new = {
            "mean": 0.9 * state["mean"] + 0.1 * (x * mask[:, None]).sum(0) / weight,
            "largest": jnp.maximum(state["largest"], jnp.abs(x * mask[:, None]).max()),
            "seen": state["seen"] + (mask > 0).sum().astype(jnp.int32),
        }
        return total / weight, Aux(new, {"squared_error": (total, weight)}, weight)

    inputs = Spec((batch, features), jnp.float32, ("batch", None))
    return Task(
        init=init,
        loss=loss,
        methods={"predict": Method(predict, {"inputs": inputs})},
        batch={
            "inputs": inputs,
            "targets": Spec((batch,), jnp.float32, ("batch",)),
            "mask": Spec((batch,), jnp.float32, ("batch",)),
        },
        axes={
            "params": {"linear": {"kernel": jax.P("embed"), "bias": jax.P()}},
            "state": {"mean": jax.P("embed"), "largest": jax.P(), "seen": jax.P()},
            "frozen": {"scale": jax.P("embed")},
        },
        merge={"largest": "max", "seen": "sum"},
    )


def leaking_state(length: int = 2) -> Task:
    """`length` steps a call of x <- 0.9 x + rate * (1 - x) + noise from a start that is drawn, losing x^2 each: state that what
    the params did before has an influence on. Its batch is {}."""

    def init(key: Key) -> Variables:
        return {
            "params": {"rate": jnp.full((2,), 0.1)},
            "state": {"x": jax.random.normal(key, (2,)), "t": jnp.zeros((), jnp.int32)},
            "frozen": {"noise": jnp.full((2,), 0.01)},
        }

    def loss(variables: Variables, batch: Batch, key: Key):
        def step(x: jax.Array, key: Key):
            noise = variables["frozen"]["noise"] * jax.random.normal(key, (2,))
            x = 0.9 * x + variables["params"]["rate"] * (1 - x) + noise
            return x, (x**2).sum()

        x, losses = jax.lax.scan(step, variables["state"]["x"], jax.random.split(key, length))
        state = {"x": x, "t": variables["state"]["t"] + length}
        return losses.mean(), Aux(state, {"last": (losses[-1], jnp.ones(()))}, None)

    return Task(init, loss, {}, {})
