"""Hypergradients against finite differences and closed forms, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core import contracts
from research.core.batches import from_function
from research.core.loop import fit
from research.core.types import Aux, Spec, Task
from research.learners import gradient
from research.transforms import bilevel, decayed, hyper
from research.transforms._example import small_classifier

KEY = jax.random.key(0)
HYPER = {"log_decay": -1.0, "log_rate": -3.0, "log_weights": [0.1, -0.2, 0.3, 0.0, 0.5]}


def least_squares(weights=None):
    """sum_i weights_i (a_i.w - b_i)^2 / 2 of a batch {"a": [5, 3], "b": [5]}."""

    def loss(variables, batch, key):
        error = (batch["a"] @ variables["params"]["w"] - batch["b"]) ** 2
        return (error if weights is None else weights * error).sum() / 2, Aux(variables["state"], {}, None)

    def init(key):
        return {"params": {"w": jax.random.normal(key, (3,))}, "state": {}, "frozen": {}}

    return Task(init, loss, {}, {"a": Spec((5, 3), jnp.float32), "b": Spec((5,), jnp.float32)})


def start(key):
    return jax.tree.map(jnp.asarray, HYPER, is_leaf=lambda x: isinstance(x, list))


def inner_task():
    return hyper(lambda h: decayed(least_squares(jnp.exp(h["log_weights"])), jnp.exp(h["log_decay"])), start)


def of(steps, form="unrolled", **options):
    return bilevel(inner_task(), hyper(lambda h: least_squares(), start),
                   lambda h: optax.sgd(jnp.exp(h["log_rate"]), momentum=0.5), steps, hypergradient=form, **options)  # fmt: skip


def problem(steps):
    """(hyperparameters, where w starts, batch), float64; all steps on one batch."""
    draw = [jax.random.normal(jax.random.key(i), (5, 4), jnp.float64) for i in (1, 2)]
    train, validation = ({"a": d[:, :3], "b": d[:, 3]} for d in draw)
    batch = {"train": jax.tree.map(lambda x: jnp.stack([x] * steps), train), "validation": validation}
    return jax.tree.map(lambda x: x.astype(jnp.float64), start(KEY)), jnp.ones(3, jnp.float64), batch


def hypergradient(task, h, w, batch):
    """(gradient, the loss as a function of the hyperparameters, where w ends)."""
    state = task.init(KEY)["state"]
    state = {**jax.tree.map(lambda x: x.astype(jnp.float64), state), "inner": {"w": w}}

    @jax.jit
    def loss(h):
        value, aux = task.loss({"params": h, "state": state, "frozen": {}}, batch, KEY)
        return value, aux.state["inner"]["w"]

    (_, end), grads = jax.value_and_grad(loss, has_aux=True)(h)
    return grads, lambda h: loss(h)[0], end


def differences(loss, h):
    flat, back = jax.flatten_util.ravel_pytree(h)
    e = 1e-5 * jnp.eye(flat.size, dtype=flat.dtype)
    return back(jnp.stack([(loss(back(flat + d)) - loss(back(flat - d))) / 2e-5 for d in e]))


def close(a, b, rtol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-9), a, b)


def closed_form(h, batch):
    """The hypergradient at the minimum of the inner loss, and that minimum."""
    a, b = (batch["train"][k][0] for k in "ab")
    weights, decay = jnp.exp(h["log_weights"]), jnp.exp(h["log_decay"])
    hessian = a.T @ (weights[:, None] * a) + decay * jnp.eye(3)
    w = jnp.linalg.solve(hessian, a.T @ (weights * b))
    c, d = (batch["validation"][k] for k in "ab")
    back = jnp.linalg.solve(hessian, c.T @ (c @ w - d))
    grads = {
        "log_decay": -decay * w @ back,
        "log_rate": jnp.zeros(()),
        "log_weights": -weights * (a @ w - b) * (a @ back),
    }
    return grads, w


@pytest.mark.parametrize("remat", [False, True])
def test_unrolled_is_exact(remat):
    with jax.enable_x64(True):
        h, w, batch = problem(7)
        grads, loss, _ = hypergradient(of(7, remat=remat), h, w, batch)
        close(grads, differences(loss, h), 1e-6)
        assert all(jnp.abs(g).max() > 1e-4 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("form, options", [("implicit_cg", {"iterations": 6}), ("neumann", {"iterations": 600, "rate": 0.05})])
def test_implicit_is_exact_at_the_minimum(form, options):
    with jax.enable_x64(True):
        h, w, batch = problem(400)
        grads, _, end = hypergradient(of(400, form, **options), h, w, batch)
        wanted, minimum = closed_form(h, batch)
        close(end, minimum, 1e-6)
        close(grads, wanted, 1e-6)


def test_one_step_is_through_the_last_step_alone():
    with jax.enable_x64(True):
        h, w, batch = problem(1)
        many = problem(5)[2]
        at_last = hypergradient(of(5, "one_step"), h, w, many)[0]
        before = of(4)  # where the fifth step begins: w and the momentum
        state = jax.tree.map(lambda x: x.astype(jnp.float64), before.init(KEY)["state"])
        state = {**state, "inner": {"w": w}}
        four = {**many, "train": jax.tree.map(lambda x: x[:4], many["train"])}
        state = before.loss({"params": h, "state": state, "frozen": {}}, four, KEY)[1].state
        last = of(1)
        wanted = jax.grad(lambda h: last.loss({"params": h, "state": state, "frozen": {}}, batch, KEY)[0])(h)
        close(at_last, wanted, 1e-9)


def test_without_an_outer_task_the_loss_is_the_mean_of_the_last_inner_ones():
    with jax.enable_x64(True):
        h, w, batch = problem(6)
        task = bilevel(inner_task(), None, lambda h: optax.sgd(jnp.exp(h["log_rate"])), 6, last=2)
        grads, loss, _ = hypergradient(task, h, w, {"train": batch["train"]})
        close(grads, differences(loss, h), 1e-6)
        a, b = (batch["train"][k][0] for k in "ab")
        losses = []
        for _ in range(6):
            error = a @ w - b
            weights, decay = jnp.exp(h["log_weights"]), jnp.exp(h["log_decay"])
            losses.append(float((weights * error**2).sum() / 2 + decay / 2 * (w**2).sum()))
            w = w - jnp.exp(h["log_rate"]) * (a.T @ (weights * error) + decay * w)
        assert float(loss(h)) == pytest.approx(np.mean(losses[-2:]), rel=1e-9)


def test_it_goes_on_where_it_ended_or_begins_anew():
    batch = jax.tree.map(lambda s: jnp.ones(s.shape), of(2).batch)
    going_on, anew = of(2), of(2, restart=True)
    variables = going_on.init(KEY)
    once = going_on.loss(variables, batch, KEY)[1].state
    twice = going_on.loss({**variables, "state": once}, batch, KEY)[1].state
    four = of(4).loss(variables, {**batch, "train": jax.tree.map(lambda x: jnp.tile(x, (2,) + (1,) * (x.ndim - 1)),
                                                                 batch["train"])}, KEY)[1].state  # fmt: skip
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), twice, four)
    fresh = anew.loss(variables, batch, KEY)[1].state
    jax.tree.map(np.testing.assert_array_equal, fresh, anew.loss({**variables, "state": once}, batch, KEY)[1].state)
    assert (fresh["inner"]["w"] != anew.loss(variables, batch, jax.random.key(1))[1].state["inner"]["w"]).any()


@pytest.mark.slow
def test_a_rate_is_learned_by_the_loop():
    """From a rate far too small, hypergradients find a larger one, by which validation improves."""
    draw = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    train, validation = ({"a": d[:, :3], "b": d[:, :3] @ np.ones(3, np.float32)} for d in draw)
    batch = {"train": jax.tree.map(lambda x: np.stack([x] * 5), train), "validation": validation}
    task = of(5, restart=True)
    learner = gradient(task, optax.adam(0.1))
    contracts.check_learner(learner)
    slow = task.init(KEY)
    slow["params"]["log_rate"] = jnp.full((), -7.0)
    state = fit(learner, from_function(lambda i: batch), 30, key=KEY, steps_per_call=10, log_every=10, variables=slow)
    assert state["params"]["log_rate"] > -6
    loss = jax.jit(jax.vmap(lambda p, k: task.loss({**slow, "params": p}, batch, k)[0], (None, 0)))
    losses = [loss(p, jax.random.split(KEY, 5)).mean() for p in (slow["params"], state["params"])]
    assert losses[1] < 0.7 * losses[0]


PLAIN = small_classifier(batch=4)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: of(0), "bilevel: steps=0; allowed: 1 or more"),
        (lambda: of(2, "implict_cg"), "bilevel: hypergradient='implict_cg' is unknown; allowed: .* nearest: 'implicit_cg'"),
        (lambda: of(2, last=1), "bilevel: last=1; allowed: 1 to steps=2 where outer is None"),
        (lambda: of(2, iterations=0), "bilevel: iterations=0; allowed: 1 or more"),
        (lambda: of(2, rate=0.0), "bilevel: rate=0.0; allowed: above 0"),
        (
            lambda: bilevel(inner_task(), None, lambda h: optax.sgd(0.1), 2, hypergradient="one_step"),
            "bilevel: hypergradient='one_step' needs an outer task; allowed without one: unrolled",
        ),
        (
            lambda: bilevel(PLAIN, PLAIN, lambda h: optax.sgd(0.1), 2),
            r"params of the inner task have the keys \['head', 'trunk'\]; allowed: inner, outer",
        ),
        (
            lambda: bilevel(inner_task(), hyper(lambda h: PLAIN, start), lambda h: optax.sgd(0.1), 2),
            "bilevel: Variables of the outer task: .*expected",
        ),
        (
            lambda: bilevel(inner_task(), None, optax.identity(), 2),
            "bilevel: inner_tx is a GradientTransformation; allowed: a function of the hyperparameters",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
