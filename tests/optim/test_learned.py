"""Learned optimizers compute what their papers say, on a fixed problem, step by step, in NumPy; theta goes where it is sent."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core.contracts import check_same
from research.core.tree import joined, leaves_with_paths
from research.core.types import LearnedOptimizer
from research.optim.learned import (
    LEARNED,
    carried,
    coordinatewise_rnn,
    learned_optimizer,
    learned_scales,
    neural_preconditioner,
    per_parameter_mlp,
)

KEY = jax.random.key(0)
PARAMS = {"kernel": jax.random.normal(jax.random.key(1), (4, 3)), "bias": jnp.arange(3.0), "scale": jnp.full((), 2.0)}
GRADIENTS = [jax.tree.map(lambda p, i=i: jnp.sin(3 * p + i) * (i + 0.1), PARAMS) for i in range(3)]
SMALL = {name: {"name": name, "version": kind.version} for name, kind in LEARNED.items()}


def steps(tx, gradients=GRADIENTS, params=PARAMS):
    """The updates of each gradient, params moving by them."""

    @jax.jit
    def run():
        state, p, seen = tx.init(params), params, []
        for g in gradients:
            u, state = tx.update(g, state, p)
            p = optax.apply_updates(p, u)
            seen.append(u)
        return seen

    return jax.device_get(run())


def host(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def close(found, expected, rtol=2e-4):
    """float32 sums of some tens of terms, against float64."""
    for a, b in zip(found, expected, strict=True):
        for path, x in leaves_with_paths(a):
            y = dict(leaves_with_paths(b))[path]
            np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(y).max(), err_msg=joined(path))


@pytest.mark.parametrize("name", sorted(LEARNED))
def test_a_learned_optimizer_keeps_its_contract(name):
    """theta is nested dicts of floats, updates are shaped as params, and the state keeps its form under a gradient of theta."""
    made = learned_optimizer(SMALL[name])
    assert isinstance(made, LearnedOptimizer)
    theta = jax.eval_shape(made.init, KEY)
    assert all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(theta))

    def moved(theta):
        tx = made.transformation(theta)
        state = tx.init(PARAMS)
        updates, after = tx.update(GRADIENTS[0], state, PARAMS)
        check_same(state, after, "state")
        check_same(PARAMS, updates, "updates")
        return sum(u.sum() for u in jax.tree.leaves(updates))

    check_same(theta, jax.eval_shape(jax.grad(moved), theta), "gradient")


def decayed(mean, decay, new):
    return decay * mean + (1 - decay) * new


def unit(x):
    return x / np.sqrt(1e-5 + (x**2).mean())


def test_the_per_parameter_mlp_computes_its_papers_update():
    """Features, normalization, network and step of Metz et al. 2022 written out, one parameter at a time."""
    made = per_parameter_mlp(nominal=0.01, exponent=0.5)
    theta = jax.tree.map(lambda x: x + 0.01, made.init(KEY))
    w = host(theta)
    decays = {
        name: 1 - (1 - np.array(d)) * np.exp(10 * w["decays"][name])
        for name, d in {"momentum": (0.9, 0.99, 0.999), "square": (0.999,), "factored": (0.9, 0.99, 0.999)}.items()
    }
    p, gradients = host(PARAMS), [host(g) for g in GRADIENTS]
    kept, expected = {}, []
    for t, grads in enumerate(gradients, 1):
        moved = {}
        for name, g in grads.items():
            s = kept.setdefault(name, {"m": [0, 0, 0], "v": 0, "row": [0, 0, 0], "col": [0, 0, 0]})
            row, col = ((g**2).mean(1), (g**2).mean(0)) if g.ndim == 2 else (g**2, g**2)
            s["m"] = [decayed(m, d, g) for m, d in zip(s["m"], decays["momentum"])]
            s["v"] = decayed(s["v"], decays["square"][0], g**2)
            s["row"] = [decayed(r, d, row) for r, d in zip(s["row"], decays["factored"])]
            s["col"] = [decayed(c, d, col) for c, d in zip(s["col"], decays["factored"])]
            wide = [(r[:, None] + 0 * g, c[None] + 0 * g) if g.ndim == 2 else (r, c) for r, c in zip(s["row"], s["col"])]
            by = [
                1 / np.sqrt(r / (r0.mean() + 1e-9) + 1e-9) / np.sqrt(c + 1e-9) if g.ndim == 2 else 1 / np.sqrt(r + 1e-9)
                for (r, c), r0 in zip(wide, s["row"])
            ]
            inverse = 1 / np.sqrt(s["v"] + 1e-6)
            features = [g, p[name], *s["m"], s["v"], *(m * inverse for m in s["m"]), inverse, *(g * f for f in by)]
            features += [r for r, _ in wide] + [c for _, c in wide]
            features += [1 / np.sqrt(r + 1e-8) for r, _ in wide] + [1 / np.sqrt(c + 1e-8) for _, c in wide]
            features += [m * f for m, f in zip(s["m"], by)]
            times = np.tanh(t / np.array([1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5]) - 1)
            x = np.stack([*(unit(f) for f in features), *(np.full(g.shape, v) for v in times)], -1)
            assert x.shape[-1] == 39
            for i in range(3):
                x = x @ w["network"][str(i)]["kernel"] + w["network"][str(i)]["bias"]
                x = np.maximum(x, 0) if i < 2 else x
            adam = s["m"][0] / (1 - decays["momentum"][0] ** t) / (np.sqrt(s["v"] / (1 - decays["square"][0] ** t)) + 1e-8)
            rate = 0.01 * np.exp(10 * (w["rate"][0] + w["rate"][1:] @ times))
            moved[name] = -1e-3 * x[..., 0] * np.exp(0.5 * x[..., 1]) - rate * adam
        p = {name: p[name] + moved[name] for name in p}
        expected.append(moved)
    close(steps(made.transformation(theta)), expected)


def test_the_rnn_computes_its_papers_update():
    """The LSTM of Andrychowicz et al. 2016 on gradients preprocessed as in appendix A, a gradient of 0 among them."""
    made = coordinatewise_rnn(hidden=5)
    theta = made.init(KEY)
    w = host(theta)
    gradients = [*GRADIENTS[:2], jax.tree.map(lambda g: g * 1e-6, GRADIENTS[2])]
    expected, kept = [], {}
    for grads in (host(g) for g in gradients):
        moved = {}
        for name, g in grads.items():
            flat = g.reshape(-1)
            size = np.maximum(np.abs(flat), 1e-300)
            large = size >= np.exp(-10)
            x = np.stack([np.where(large, np.log(size) / 10, -1), np.where(large, np.sign(flat), np.exp(10) * flat)], -1)
            for i in range(2):
                h, c = kept.get((name, i), (np.zeros((flat.size, 5)),) * 2)
                gates = np.concatenate([x, h], -1) @ w["cells"][str(i)]["kernel"] + w["cells"][str(i)]["bias"]
                sig = [1 / (1 + np.exp(-gates[:, k * 5 : k * 5 + 5])) for k in range(4)]
                c = sig[1] * c + sig[0] * np.tanh(gates[:, 10:15])
                x = sig[3] * np.tanh(c)
                kept[name, i] = x, c
            moved[name] = 0.1 * (x @ w["out"]["kernel"] + w["out"]["bias"])[:, 0].reshape(g.shape)
        expected.append(moved)
    close(steps(made.transformation(theta), gradients), expected)


@pytest.mark.parametrize(
    ("made", "known"),
    [
        (learned_scales(learning_rate=0.02), optax.adam(0.02)),
        (
            learned_scales(base="momentum", learning_rate=0.02),
            optax.chain(optax.ema(0.9, debias=False), optax.scale(-0.02)),
        ),
        (neural_preconditioner(learning_rate=0.02), optax.adam(0.02)),
    ],
    ids=["adam", "momentum", "preconditioner"],
)
def test_an_untrained_theta_is_the_known_optimizer_it_begins_as(made, known):
    close(steps(made.transformation(made.init(KEY))), steps(known), 1e-5)


def test_learned_scales_follow_theta():
    """A rate that is moved, a schedule and another decay, against optax with the same."""
    made = learned_scales(learning_rate=0.02)
    theta = made.init(KEY)
    theta["log_rate"] = jnp.log(0.1)
    theta["schedule"] = theta["schedule"].at[1].set(2.0)
    theta["decays"]["momentum"] = jnp.array([jnp.log(5.0) / 10])  # 1 - 0.1 * 5 = 0.5

    def rate(count):
        return 0.1 * jnp.exp(2 * jnp.tanh((count + 1) / 3 - 1))

    close(steps(made.transformation(theta)), steps(optax.adam(rate, b1=0.5)), 1e-5)


def test_a_preconditioner_goes_down_the_momentum_whatever_is_learned():
    made = neural_preconditioner(learning_rate=0.02)
    theta = jax.tree.map(lambda x: x + jax.random.normal(KEY, x.shape), made.init(KEY))
    theta["decays"] = made.init(KEY)["decays"]
    momentum = steps(optax.ema(0.9))
    for update, m in zip(steps(made.transformation(theta)), momentum, strict=True):
        assert all((np.sign(u) == -np.sign(x)).all() for u, x in zip(jax.tree.leaves(update), jax.tree.leaves(m)))


def test_updates_keep_the_dtype_of_params():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    made = per_parameter_mlp()
    tx = made.transformation(made.init(KEY))
    update = jax.eval_shape(lambda: tx.update(params, tx.init(params), params)[0])
    assert {x.dtype for x in jax.tree.leaves(update)} == {jnp.dtype(jnp.bfloat16)}


def test_theta_that_is_carried_is_used_from_the_state():
    """What goes on from a checkpoint uses the theta that is in it, not the one at hand."""
    made = learned_scales(learning_rate=0.02)
    one, other = made.init(KEY), {**made.init(KEY), "log_rate": jnp.zeros(())}
    state = carried(made, one).init(PARAMS)
    expected, _ = made.transformation(one).update(GRADIENTS[0], made.transformation(one).init(PARAMS), PARAMS)
    found, after = carried(made, other).update(GRADIENTS[0], state, PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
    jax.tree.map(np.testing.assert_array_equal, after.theta, one)


def test_what_cannot_be_is_refused_in_one_line():
    cases = [
        (
            lambda: learned_optimizer({"name": "per_parameter_mpl", "version": 1}),
            "learned_optimizer.name='per_parameter_mpl' is",
        ),
        (
            lambda: learned_optimizer({"name": "learned_scales"}),
            "learned_optimizer lacks learned_optimizer.version; given: name",
        ),
        (
            lambda: learned_optimizer({"name": "learned_scales", "version": 2}),
            "learned_optimizer.version=2 of learned_scales is not what this code computes; allowed: 1",
        ),
        (lambda: learned_optimizer({**SMALL["learned_scales"], "hiden": 4}), "learned_optimizer.hiden is unknown; allowed in"),
        (
            lambda: learned_scales(base="adamm"),
            "learned_scales: base='adamm' is unknown; allowed: adam, momentum; nearest: 'adam'",
        ),
        (lambda: learned_scales(learning_rate=0.0), "learned_scales: learning_rate=0.0; allowed: above 0"),
        (lambda: per_parameter_mlp(hidden=0), "per_parameter_mlp: hidden=0"),
        (lambda: coordinatewise_rnn(step=-1.0), "coordinatewise_rnn: hidden=20, layers=2, step=-1.0"),
        (lambda: neural_preconditioner(layers=0), "neural_preconditioner: hidden=8, layers=0"),
    ]
    for act, said in cases:
        with pytest.raises(ValueError) as error:
            act()
        assert str(error.value).startswith(said) and "\n" not in str(error.value)
