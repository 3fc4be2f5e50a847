"""A least-squares learner on plain functions, small enough to check by hand: what core's own tests train."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from research.core.batches import from_function
from research.core.types import Learner, Method, Spec

SPECS = {"inputs": Spec((4, 3), jnp.float32, ("batch", None)), "targets": Spec((4,), jnp.float32, ("batch",))}


def learner(rate: float = 0.1, specs=SPECS) -> Learner:
    """Gradient descent on the mean squared error of a linear model; the state counts examples."""

    def predict(variables, inputs, key):
        return inputs["inputs"] @ variables["params"]["w"] + variables["params"]["b"]

    def loss(params, batch):
        error = predict({"params": params}, batch, None) - batch["targets"]
        return (error**2).mean()

    def init(key, variables=None):
        given = {"params": {"w": jax.random.normal(key, (3,)), "b": jnp.zeros(())}, "state": {"seen": jnp.zeros((), jnp.int32)}}
        return {"step": jnp.zeros((), jnp.int32), "frozen": {}, **(given if variables is None else variables)}

    def step(state, batch, key):
        value, grads = jax.value_and_grad(loss)(state["params"], batch)
        params = jax.tree.map(lambda p, g: p - rate * g, state["params"], grads)
        seen = state["state"]["seen"] + 4
        new = {**state, "step": state["step"] + 1, "params": params, "state": {"seen": seen}}
        return new, {"loss": (value, jnp.float32(1)), "draw": (jax.random.uniform(key), jnp.float32(1))}

    def variables(state):
        return {k: state[k] for k in ("params", "state", "frozen")}

    axes = {"step": jax.P(), "frozen": {}, "params": {"w": jax.P("embed"), "b": jax.P()}, "state": {"seen": jax.P()}}
    methods = {"predict": Method(predict, {"inputs": specs["inputs"]})}
    return Learner(init, step, variables, methods, specs, axes)


def batch(i: int) -> dict[str, np.ndarray]:
    """The i-th batch: targets are a fixed linear function of the inputs."""
    inputs = np.random.default_rng(i).normal(size=(4, 3)).astype(np.float32)
    return {"inputs": inputs, "targets": (inputs @ np.float32([1, -2, 3]) + 1).astype(np.float32)}


def batches(length: int | None = None):
    return from_function(batch, length, "toy")


def same_bits(a, b) -> bool:
    """Whether two trees hold the same bits."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


KEY = jax.random.key(0)
