"""Evolution strategies, each beside its formulas in NumPy or known behaviour, as a learner."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core.types import Aux, Method, Spec, Task
from research.learners import evolution, population
from research.optim.strategies import cma_es, open_es, snes
from tests.learners.toys import KEY, TASK, a_batch, close, started, stepped, trained


def bowl(d=5, condition=100.0):
    """sum_i scale_i (x_i - 1)^2, the same whatever the batch."""
    scales = jnp.geomspace(1.0, condition, d)

    def init(key):
        return {"params": {"x": jnp.zeros(d)}, "state": {}, "frozen": {}}

    def loss(variables, batch, key):
        return (scales * (variables["params"]["x"] - 1) ** 2).sum(), Aux({}, {}, None)

    inputs = Spec((1,), jnp.float32, ("batch",))
    return Task(init, loss, {"predict": Method(lambda v, i, k: i["x"], {"x": inputs})}, {"x": inputs})


STRATEGIES = {
    "open_es": lambda: open_es(32, 0.05, optax.adam(0.05)),
    "cma_es": lambda: cma_es(12, 0.5),
    "snes": lambda: snes(12, 0.5),
}


def searched(strategy, generations, task=None):
    learner = evolution(task or bowl(), strategy)

    def body(state, key):
        state, metrics = learner.step(state, {"x": jnp.zeros(1)}, key)
        return state, metrics["loss_best"][0]

    return jax.jit(lambda state: jax.lax.scan(body, state, jax.random.split(KEY, generations)))(started(learner))


@pytest.mark.parametrize("name", STRATEGIES)
def test_it_finds_the_bottom_of_a_bowl(name):
    state, best = searched(STRATEGIES[name](), 300)
    assert best[-1] < (0.3 if name == "open_es" else 1e-6) < best[0]
    np.testing.assert_allclose(state["params"]["x"], np.ones(5), atol=0.1 if name == "open_es" else 1e-2)


def test_cma_learns_the_shape_of_the_bowl():
    state, _ = searched(cma_es(12, 0.5), 150)
    covariance = np.asarray(state["search"]["covariance"], np.float64)
    ratio = np.diag(np.linalg.inv(covariance))
    np.testing.assert_allclose(ratio / ratio[0], np.geomspace(1, 100, 5), rtol=1.0)
    basis, scales = (np.asarray(state["search"][k], np.float64) for k in ("basis", "scales"))
    np.testing.assert_allclose((basis * scales**2) @ basis.T, covariance, rtol=1e-3, atol=1e-5 * covariance.max())


def test_open_es_is_its_formula():
    n, sigma = 6, 0.2
    strategy = open_es(n, sigma, optax.sgd(0.5))
    search = strategy.init(jnp.arange(4.0))
    samples = np.asarray(strategy.ask(search, KEY))
    np.testing.assert_allclose(samples[:3] + samples[3:], np.broadcast_to(2 * np.arange(4.0), (3, 4)), atol=1e-5)
    losses = np.asarray([3.0, 1.0, 2.0, 9.0, -1.0, 5.0])
    shaped = np.asarray([3, 1, 2, 5, 0, 4]) / 5 - 0.5
    expected = np.arange(4.0) - 0.5 * shaped @ ((samples - np.arange(4.0)) / sigma) / (n * sigma)
    np.testing.assert_allclose(strategy.tell(search, samples, jnp.asarray(losses))["mean"], expected, rtol=1e-4)


def test_snes_is_its_formula():
    strategy = snes(4, 0.3)
    search = strategy.init(jnp.asarray([1.0, -2.0]))
    samples = np.asarray(strategy.ask(search, KEY), np.float64)
    raw = np.maximum(0, np.log(3) - np.log([1, 2, 3, 4]))
    u = (raw / raw.sum() - 0.25)[[2, 0, 3, 1]]
    z = (samples - [1, -2]) / 0.3
    new = strategy.tell(search, jnp.asarray(samples, jnp.float32), jnp.asarray([2.0, 0.0, jnp.nan, 1.0]))
    np.testing.assert_allclose(new["mean"], [1, -2] + 0.3 * u @ z, rtol=1e-5)
    rate = (3 + np.log(2)) / (5 * np.sqrt(2))
    np.testing.assert_allclose(new["sigma"], 0.3 * np.exp(0.5 * rate * u @ (z**2 - 1)), rtol=1e-5)


def test_a_cma_step_is_figure_6_of_the_tutorial():
    """From a covariance that is no identity, against NumPy in float64."""
    n, d = 8, 3
    rng = np.random.default_rng(0)
    c = rng.standard_normal((d, d))
    c = c @ c.T + np.eye(d)
    values, basis = np.linalg.eigh(c)
    p_s, p_c, mean, sigma = rng.standard_normal(d) / 3, rng.standard_normal(d) / 3, rng.standard_normal(d), 0.4
    samples, losses = mean + sigma * rng.standard_normal((n, d)), rng.standard_normal(n)

    raw = np.log((n + 1) / 2) - np.log(np.arange(1, n + 1))
    mu = raw[:4].sum() ** 2 / (raw[:4] ** 2).sum()
    mu_minus = raw[4:].sum() ** 2 / (raw[4:] ** 2).sum()
    c_c, c_1 = (4 + mu / d) / (d + 4 + 2 * mu / d), 2 / ((d + 1.3) ** 2 + mu)
    c_mu = min(1 - c_1, 2 * (mu + 1 / mu - 2) / ((d + 2) ** 2 + mu))
    least = min(1 + c_1 / c_mu, 1 + 2 * mu_minus / (mu + 2), (1 - c_1 - c_mu) / (d * c_mu))
    w = np.where(raw >= 0, raw / raw[raw > 0].sum(), least * raw / -raw[raw < 0].sum())
    c_s = (mu + 2) / (d + mu + 5)
    d_s = 1 + 2 * max(0, np.sqrt((mu - 1) / (d + 1)) - 1) + c_s
    chi = np.sqrt(d) * (1 - 1 / (4 * d) + 1 / (21 * d**2))
    y = (samples[np.argsort(losses)] - mean) / sigma
    root = basis @ np.diag(values**-0.5) @ basis.T
    step = np.maximum(w, 0) @ y
    new_p_s = (1 - c_s) * p_s + np.sqrt(c_s * (2 - c_s) * mu) * root @ step
    length = np.linalg.norm(new_p_s)
    h = float(length / np.sqrt(1 - (1 - c_s) ** (2 * 5)) < (1.4 + 2 / (d + 1)) * chi)
    new_p_c = (1 - c_c) * p_c + h * np.sqrt(c_c * (2 - c_c) * mu) * step
    own = np.where(w >= 0, w, w * d / ((y @ root) ** 2).sum(1))
    new_c = (1 + c_1 * (1 - h) * c_c * (2 - c_c) - c_1 - c_mu * w.sum()) * c + c_1 * np.outer(new_p_c, new_p_c)
    new_c = new_c + c_mu * np.einsum("i,ij,ik->jk", own, y, y)

    search = {
        "mean": mean, "sigma": np.asarray(sigma), "path_sigma": p_s, "path_c": p_c, "covariance": c, "basis": basis,
        "scales": values**0.5, "count": np.int32(3),
    }  # fmt: skip
    search = {k: jnp.asarray(v, None if k == "count" else jnp.float32) for k, v in search.items()}
    found = cma_es(n, 1.0).tell(search, jnp.asarray(samples, jnp.float32), jnp.asarray(losses, jnp.float32))
    np.testing.assert_allclose(found["mean"], mean + sigma * step, rtol=1e-4)
    np.testing.assert_allclose(found["sigma"], sigma * np.exp(c_s / d_s * (length / chi - 1)), rtol=1e-4)
    np.testing.assert_allclose(found["path_sigma"], new_p_s, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found["path_c"], new_p_c, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found["covariance"], new_c, rtol=1e-3, atol=1e-5)


def test_samples_that_are_not_finite_are_the_worst_and_count_nowhere():
    def loss(variables, batch, key):
        value, aux = TASK.loss(variables, batch, key)
        return jnp.where(variables["params"]["linear"]["bias"] > 0, jnp.nan, value), aux

    learner = evolution(TASK._replace(loss=loss), snes(16, 0.3))
    state, metrics = stepped(learner, started(learner), a_batch())
    assert state["params"]["linear"]["bias"] < 0 and np.isfinite(metrics["loss"]).all()
    assert metrics["loss"][1] < 16 * 8


def test_metrics_are_of_the_samples_and_state_is_merged():
    learner = evolution(TASK, snes(8, 1e-4))
    state = started(learner)
    (value, aux) = TASK.loss({k: state[k] for k in ("params", "state", "frozen")}, a_batch(), KEY)
    new, metrics = stepped(learner, state, a_batch())
    assert float(metrics["loss"][0] / metrics["loss"][1]) == pytest.approx(float(value), rel=1e-2)
    assert metrics["loss_best"][0] <= metrics["loss"][0] / metrics["loss"][1]
    close(new["state"]["mean"], aux.state["mean"])
    close(new["state"]["seen"], 8 * aux.state["seen"])


def test_on_a_mesh_and_in_a_population_it_is_what_it_is_alone():
    from research.core.mesh import entered, make_layout

    learner = evolution(TASK, open_es(8, 0.1, optax.sgd(0.1)))
    alone, _ = trained(learner, 2)
    with entered(make_layout({"population": 4})):
        close(trained(learner, 2)[0], alone)
    both = population(learner, 2)
    state, _ = stepped(both, started(both), a_batch())
    assert not np.array_equal(*state["params"]["linear"]["kernel"])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: open_es(7, 0.1, optax.sgd(0.1)), "open_es: n=7; allowed: an even number"),
        (lambda: cma_es(1, 0.1), "cma_es: n=1; allowed: 2 or more"),
        (lambda: snes(4, 0.0), "snes: sigma=0.0; allowed: above 0"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
