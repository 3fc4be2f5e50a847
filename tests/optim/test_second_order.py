"""SOAP, Shampoo and PSGD: what each keeps, refuses and promises beside its trajectory (test_references.py)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.axes import axes_like
from research.core.collectives import collectives, totals
from research.core.mesh import entered, make_layout
from research.core.tree import joined, leaves_with_paths
from research.optim import make
from research.optim.psgd_kron import fitted, lower_bound, preconditioned, probability, scale_by_psgd_kron
from research.optim.shampoo import inverse_root, scale_by_shampoo
from research.optim.soap import scale_by_soap

SECOND_ORDER = {
    "soap": {"every": 2},
    "shampoo": {"every": 2, "block": 8},
    "psgd_kron": {},
}
ONE_BY_DEFAULT = [pytest.param(n, marks=() if n == "shampoo" else pytest.mark.slow) for n in SECOND_ORDER]
P = jax.P


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def made(name, **more):
    return make({"name": name, "learning_rate": 0.1, **SECOND_ORDER[name], **more}, steps=10)


@pytest.mark.parametrize("name", ONE_BY_DEFAULT)
def test_stacked_matrices_are_each_as_if_alone(name):
    """Layers stacked in one leaf move as they would in leaves of their own. PSGD's draws and its limit are of a whole leaf."""
    tx = made(name) if name != "psgd_kron" else scale_by_psgd_kron(draw=lambda seed, count, leaf, like: jnp.ones_like(like))
    stack = normal(2, 8, 12) * jnp.asarray([1.0, 1.0]).reshape(2, 1, 1)
    leaves = {"a": stack[0], "b": stack[1]}
    update = jax.jit(tx.update)
    whole, apart = tx.init({"w": stack}), tx.init(leaves)
    for i in range(3):
        g = 0.1 * normal(2, 8, 12, seed=i + 1)
        together, whole = update({"w": g}, whole, {"w": stack})
        alone, apart = update({"a": g[0], "b": g[1]}, apart, leaves)
        for k, own in enumerate(alone.values()):
            scale = 1.0
            if name == "psgd_kron":  # the limit may scale a leaf down
                scale = float(jnp.linalg.norm(together["w"][k]) / jnp.linalg.norm(own))
            np.testing.assert_allclose(together["w"][k], scale * own, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_state_is_laid_out_as_its_parameters(name):
    params = {"up": jnp.zeros((16, 24)), "layers": {"down": jnp.zeros((2, 24, 16))}, "bias": jnp.zeros(24)}
    axes = {"up": P("embed", "mlp"), "layers": {"down": P("layers", "mlp", "embed")}, "bias": P("mlp")}
    state = made(name).init(params)
    found = axes_like(state, {"params": params, "state": {}, "frozen": {}}, {"params": axes, "state": {}, "frozen": {}})
    named = {joined(path): (x.shape, a) for (path, x), (_, a) in zip(leaves_with_paths(state), leaves_with_paths(found))}
    lacking = [path for path, (shape, a) in named.items() if shape and not any(a)]
    assert not lacking, lacking
    left = [a for path, (_, a) in named.items() if "/left/" in path and path.endswith("up")]
    right = [a for path, (_, a) in named.items() if "/right/" in path and path.endswith("down")]
    assert left and all(a[0] == "embed" for a in left) and right and all(a[-1] == "embed" for a in right)


@pytest.mark.parametrize("name", ONE_BY_DEFAULT)
def test_over_sharded_matrices_it_is_what_it_is_on_one_device(name):
    layout = make_layout({"fsdp": 4})
    rows = jax.NamedSharding(layout.mesh, P("fsdp"))
    params = {str(i): normal(16, 8, seed=i) for i in range(3)}
    tx = made(name)

    def steps(params, state):
        for i in range(3):
            updates, state = tx.update(jax.tree.map(lambda p, i=i: p + 0.3 * jnp.cos(i * p), params), state, params)
        return updates, state

    alone, _ = jax.jit(steps)(params, tx.init(params))
    with entered(layout):
        laid = jax.tree.map(lambda x: jax.device_put(x, rows), params)
        variables = (
            {"params": params, "state": {}, "frozen": {}},
            {"params": {k: P("embed") for k in params}, "state": {}, "frozen": {}},
        )
        abstract = jax.eval_shape(tx.init, params)
        shardings = layout.shardings(axes_like(abstract, *variables), abstract, "opt")
        state = jax.jit(tx.init, out_shardings=shardings)(laid)
        program = jax.jit(steps, out_shardings=(rows, shardings)).lower(laid, state).compile()
        found, state = program(laid, state)
    kept = [x for path, x in leaves_with_paths(state) if x.ndim == 2 and x.shape[0] == 16]
    assert kept and all(x.sharding.shard_shape(x.shape)[0] == 4 for x in kept)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=5e-3, atol=5e-5), found, alone)
    assert totals(collectives(program.as_text()))


def test_soap_with_a_side_left_out_rotates_the_other_alone():
    tx = scale_by_soap(largest=6)
    state = tx.init({"w": jnp.zeros((4, 9)), "v": jnp.zeros((9, 9)), "b": jnp.zeros(3)})
    assert set(state["left"]["basis"]) == {"w"} and not state["right"]["basis"]


def test_soap_moves_nothing_at_the_first_step_and_keeps_an_orthonormal_basis():
    tx = scale_by_soap(every=2)
    state = tx.init({"w": jnp.zeros((5, 8))})
    update = jax.jit(tx.update)
    for i in range(5):
        updates, state = update({"w": normal(5, 8, seed=i)}, state)
        assert (np.abs(updates["w"]).max() == 0) == (i == 0)
        q = state["right"]["basis"]["w"]
        np.testing.assert_allclose(q.T @ q, np.eye(8), atol=1e-5)


def test_a_root_is_that_of_the_statistic_and_of_zeros_the_identity():
    x = normal(6, 9, seed=3)
    root = np.asarray(inverse_root(x @ x.T, 0.0), np.float64)
    np.testing.assert_allclose(np.linalg.matrix_power(root, 4) @ np.asarray(x @ x.T), np.eye(6), atol=2e-3)
    np.testing.assert_array_equal(inverse_root(jnp.zeros((3, 3)), 1e-6), np.eye(3))


def test_shampoo_takes_the_grafts_length_and_before_its_start_its_direction():
    g = {"w": normal(6, 8), "b": normal(3)}
    for start in (1, 2):
        tx = scale_by_shampoo(b1=0.0, graft="sgd", start=start, block=4)
        updates, _ = jax.jit(tx.update)(g, tx.init(g))
        np.testing.assert_allclose(jnp.linalg.norm(updates["w"]), jnp.linalg.norm(g["w"]), rtol=1e-5)
        assert np.allclose(updates["w"], g["w"], rtol=1e-4) == (start == 2)
        np.testing.assert_array_equal(updates["b"], g["b"])


def test_psgd_whitens_what_it_is_fitted_to():
    """Gradients M Z N, Z normal: after enough fits the direction's entries have unit variance and are uncorrelated."""
    rng = np.random.default_rng(0)
    m, n = np.diag([3.0, 1.0, 0.2]) @ rng.standard_normal((3, 3)), np.diag([2.0, 1.0, 0.5, 0.3])

    def fit(rate, q, keys):
        def body(q, keys):
            h = m @ jax.random.normal(keys[0], (3, 4)) @ n
            return fitted(*q, h, jax.random.normal(keys[1], (3, 4)), rate=rate), None

        return jax.lax.scan(body, q, keys)[0]

    keys = jax.random.split(jax.random.key(0), (2000, 2))
    left, right = jax.jit(lambda keys: fit(0.01, fit(0.1, (jnp.eye(3), jnp.eye(4)), keys), keys))(keys)
    z = rng.standard_normal((4000, 3, 4))
    white = np.asarray(jax.vmap(lambda h: preconditioned(left, right, h))(jnp.asarray(m @ z @ n, jnp.float32))).reshape(
        4000, 12
    )
    np.testing.assert_allclose(white.T @ white / 4000, np.eye(12), atol=0.4)
    raw = (m @ z @ n).reshape(4000, 12)
    assert np.abs(raw.T @ raw / 4000 - np.eye(12)).max() > 5


def test_balancing_leaves_the_direction_as_it_is():
    g = {"w": normal(4, 6)}
    found = []
    for every in (1, 1000):
        tx = scale_by_psgd_kron(balance_every=every, initial=1.0)
        state = tx.init(g)
        state["left"]["w"] = 4 * state["left"]["w"]
        state["right"]["w"] = state["right"]["w"] / 4
        updates, state = jax.jit(tx.update)(g, state)
        tops = [float(jnp.abs(state[side]["w"]).max()) for side in ("left", "right")]
        found.append((updates["w"], tops[0] / tops[1]))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-4, atol=1e-6)
    assert found[0][1] < 2 and found[1][1] > 8


def test_fits_become_rarer_and_the_bound_is_near_below_the_norm():
    assert probability(jnp.int32(0)) == 1 and probability(jnp.int32(10**5)) == np.float32(0.03)
    assert float(probability(jnp.int32(1500))) == pytest.approx(np.exp(-1), rel=1e-5)
    for seed in range(5):
        x = normal(7, 7, seed=seed)
        a = x @ x.T
        assert 0.7 * np.linalg.norm(a, 2) < float(lower_bound(a)) <= 1.0001 * np.linalg.norm(a, 2)
    assert float(lower_bound(jnp.zeros((3, 3)))) == 0


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_a_gradient_of_zeros_is_safe(name):
    params = {"w": jnp.ones((4, 6)), "b": jnp.ones(3)}
    tx = made(name)
    state, update = tx.init(params), jax.jit(tx.update)
    for g in (jnp.zeros_like, jnp.zeros_like, jnp.ones_like):
        updates, state = update(jax.tree.map(g, params), state, params)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"name": "soap", "every": 0}, "optimizer.every=0 is out of range: 1 or above"),
        ({"name": "shampoo", "graft": "adm"}, "optimizer.graft='adm' is unknown; .*; nearest: 'adam'"),
        ({"name": "shampoo", "block": 0}, "optimizer.block=0 is out of range"),
        ({"name": "psgd_kron", "largest": 0}, "optimizer.largest=0 is out of range"),
        ({"name": "psgd_kron", "draw": 1}, "optimizer.draw is unknown"),
        ({"name": "schedule_free", "b1": 0.0}, "optimizer.b1=0.0 is out of range for schedule_free: above 0, below 1"),
        ({"name": "soap", "evry": 2}, "optimizer.evry is unknown; .*; nearest: 'every'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(config, message):
    with pytest.raises(ValueError, match=message) as error:
        make({"learning_rate": 0.1, **config}, steps=10)
    assert "\n" not in str(error.value)
