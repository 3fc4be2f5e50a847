"""The measured noise scale is tr(S) / |G|^2, and the gradient beside it is the gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.types import Aux, Method, Spec, Task
from research.estimates import accumulated, noise_scale

KEY = jax.random.key(0)
MEAN, DEVIATION, ROWS = np.array([1.0, -2.0, 0.5], np.float32), np.array([2.0, 1.0, 3.0], np.float32), 16


def mean_task():
    """loss = w . mean(x): the gradient of an example is x itself, of mean MEAN and covariance diag(DEVIATION^2)."""

    def init(key):
        return {"params": {"w": jnp.zeros(3)}, "state": {}, "frozen": {}}

    def loss(variables, batch, key):
        weight = batch["mask"].sum()
        each = batch["x"] @ variables["params"]["w"]
        return (each * batch["mask"]).sum() / weight, Aux({}, {}, weight)

    specs = {"x": Spec((ROWS, 3), jnp.float32, ("batch",)), "mask": Spec((ROWS,), jnp.float32, ("batch",))}
    return Task(init, loss, {"predict": Method(lambda v, i, k: i["x"], {"x": specs["x"]})}, specs)


TASK = mean_task()


def found(estimate, batch):
    return estimate.grads({}, TASK, TASK.init(KEY), batch, KEY)


def batch_of(key, mask):
    x = jnp.asarray(MEAN)[None] + jnp.asarray(DEVIATION)[None] * jax.random.normal(key, (ROWS, 3))
    return {"x": x, "mask": jnp.asarray(mask, jnp.float32)}


@pytest.mark.parametrize("masked", [0, 5])
def test_over_many_batches_it_is_the_ratio_of_the_traces(masked):
    mask = [0.0] * masked + [1.0] * (ROWS - masked)

    def one(key):
        return found(noise_scale(4), batch_of(key, mask))[1].metrics["noise_scale"]

    noise, signal = jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(KEY, 4000))
    np.testing.assert_allclose(noise.mean(), (DEVIATION**2).sum(), rtol=0.05)
    np.testing.assert_allclose(signal.mean(), (MEAN**2).sum(), rtol=0.05)


def test_loss_gradient_and_weight_are_those_of_accumulation():
    batch = batch_of(KEY, [1.0] * ROWS)
    (loss, aux, grads, _), (plain_loss, plain, plain_grads, _) = found(noise_scale(4), batch), found(accumulated(4), batch)
    np.testing.assert_array_equal(loss, plain_loss)
    np.testing.assert_array_equal(grads["w"], plain_grads["w"])
    assert aux.weight == plain.weight and set(aux.metrics) == {*plain.metrics, "noise_scale"}


def test_one_microbatch_with_anything_in_it_says_nothing():
    noise, signal = found(noise_scale(ROWS), batch_of(KEY, [1.0] + [0.0] * (ROWS - 1)))[1].metrics["noise_scale"]
    assert noise == 0 and signal == 0


def test_one_microbatch_is_refused():
    with pytest.raises(ValueError, match="noise_scale: n=1; allowed: 2 or more microbatches"):
        noise_scale(1)
