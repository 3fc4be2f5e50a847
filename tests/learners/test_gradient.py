"""`gradient` is the loop one would write by hand, and tells what it did."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core import contracts
from research.core.types import Aux, Estimate, Spec, Task
from research.estimates import accumulated, exact, sharpness_aware
from research.learners import gradient
from tests.learners.toys import KEY, TASK, a_batch, close, same, started, stepped, trained


def test_steps_are_those_of_optax_by_hand():
    tx, learner = optax.adam(0.05), gradient(TASK, optax.adam(0.05))
    state, _ = trained(learner, 3)
    variables = learner.variables(started(learner))
    opt = tx.init(variables["params"])
    for i in range(3):
        (_, aux), g = jax.value_and_grad(
            lambda p, v=variables, i=i: TASK.loss({**v, "params": p}, a_batch(i), KEY), has_aux=True
        )(variables["params"])
        updates, opt = tx.update(g, opt, variables["params"])
        variables = {**variables, "params": optax.apply_updates(variables["params"], updates), "state": aux.state}
    close(learner.variables(state), variables)
    assert state["step"] == 3 and state["opt"][0].count == 3


def test_it_learns():
    state, seen = trained(gradient(TASK, optax.adam(0.1)), 300, lambda i: a_batch(i % 5))
    assert seen[-1]["loss"][0] / seen[-1]["loss"][1] < 1e-3 * seen[0]["loss"][0] / seen[0]["loss"][1]
    close(state["params"]["linear"]["kernel"] * state["frozen"]["scale"], np.ones(3), rtol=0.02)


def test_the_loss_is_weighted_by_what_it_is_a_mean_over():
    batch = a_batch(mask=[1, 0, 1, 1, 0.5, 0, 0, 0])
    _, metrics = stepped(gradient(TASK, optax.sgd(0.1)), started(gradient(TASK, optax.sgd(0.1))), batch)
    close(metrics["loss"], metrics["squared_error"])
    assert metrics["loss"][1] == 3.5


def test_a_loss_that_is_no_weighted_mean_weighs_one():
    task = TASK._replace(loss=lambda v, b, k: (lambda value, aux: (value, aux._replace(weight=None)))(*TASK.loss(v, b, k)))
    learner = gradient(task, optax.sgd(0.1))
    _, metrics = stepped(learner, started(learner), a_batch())
    assert metrics["loss"][1] == 1 and metrics["loss"][0] == TASK.loss(learner.variables(started(learner)), a_batch(), KEY)[0]


def test_a_batch_that_counts_nothing_moves_no_param():
    learner = gradient(TASK, optax.sgd(0.1))
    start = started(learner)
    state, metrics = stepped(learner, start, a_batch(mask=[0] * 8))
    same(state["params"], start["params"])
    assert metrics["loss"] == (0, 0) and metrics["grad_norm"] == (0, 1)


def test_watched_groups_tell_gradient_norm_and_update_over_weight():
    learner = gradient(TASK, optax.sgd(0.1), watch={"all": "", "kernel": "/kernel$", "bias": "bias"})
    start = started(learner)
    g = jax.grad(lambda p: TASK.loss({**start, "params": p}, a_batch(), KEY)[0])(start["params"])["linear"]
    _, metrics = stepped(learner, start, a_batch())
    kernel = np.linalg.norm(g["kernel"])
    close(metrics["grad_norm/kernel"], (kernel, 1.0))
    close(metrics["grad_norm/all"], metrics["grad_norm"])
    close(metrics["grad_norm"][0], np.sqrt(kernel**2 + g["bias"] ** 2))
    close(metrics["update_ratio/kernel"], (0.1 * kernel / np.linalg.norm(start["params"]["linear"]["kernel"]), 1.0))
    assert metrics["update_ratio/bias"] == (0, 0)  # the weights are 0: there is no ratio to them, and it counts nothing
    assert metrics["grad_norm/bias"][0] == abs(g["bias"])


@pytest.mark.parametrize(
    "pattern, said",
    [
        ("embedding", "watch['g']: 'embedding' is found in no path of params; they are linear/bias, linear/kernel"),
        ("(", "watch['g']: '(' is no regular expression: missing ), unterminated subpattern at position 0"),
    ],
)
def test_a_group_that_watches_nothing_is_refused(pattern, said):
    with pytest.raises(ValueError) as error:
        gradient(TASK, optax.sgd(0.1), watch={"g": pattern})
    assert str(error.value) == said


def test_a_broken_task_is_refused_where_the_learner_is_made():
    with pytest.raises(contracts.ContractError, match="task.loss: expected a scalar float loss"):
        gradient(TASK._replace(loss=lambda v, b, k: (jnp.ones(2), TASK.loss(v, b, k)[1])), optax.sgd(0.1))


def test_it_starts_from_given_variables_and_refuses_others_by_path():
    learner = gradient(TASK, optax.sgd(0.1))
    given = jax.tree.map(lambda x: x + 1, learner.variables(started(learner)))
    same(learner.variables(learner.init(jax.random.key(1), given)), given)
    with pytest.raises(ValueError) as error:
        learner.init(KEY, {**given, "params": {"linear": {"kernel": jnp.zeros(4), "bias": jnp.zeros(())}}})
    assert str(error.value) == "variables: params/linear/kernel: expected float32[3], got float32[4]"


def test_optimizers_are_given_value_and_function():
    """L-BFGS with its line search needs both; on a quadratic it is done in a few steps."""
    _, seen = trained(gradient(TASK, optax.lbfgs()), 12, lambda i: a_batch(0))
    assert seen[-1]["loss"][0] < 1e-6 * seen[0]["loss"][0]
    plateau = optax.chain(optax.sgd(1e-9), optax.contrib.reduce_on_plateau(factor=0.5, patience=2, cooldown=0))
    state, _ = trained(gradient(TASK, plateau), 9, lambda i: a_batch(0))
    assert state["opt"][1].scale < 1


def test_state_has_no_weak_types_so_that_the_second_step_does_not_compile_again():
    age = optax.GradientTransformation(
        lambda params: {"age": 0.0}, lambda g, s, params=None: (g, {"age": s["age"] + jnp.float32(1)})
    )
    rate = optax.inject_hyperparams(optax.adamw)(learning_rate=optax.linear_schedule(0.1, 0.0, 10))
    learner = gradient(TASK, optax.chain(age, rate), accumulated(2))
    step = jax.jit(learner.step)
    state = started(learner)
    for i in range(3):
        state, _ = step(state, a_batch(i), KEY)
    assert step._cache_size() == 1 and state["opt"][0]["age"] == 3


def test_bfloat16_params_stay_so_and_norms_are_float32():
    spec = {"x": Spec((4, 3), jnp.bfloat16, ("batch", None))}

    def loss(variables, batch, key):
        values = (batch["x"] @ variables["params"]["w"]).astype(jnp.float32) ** 2
        return values.mean(), Aux({}, {}, jnp.full((), 4.0))

    task = Task(lambda key: {"params": {"w": jnp.ones(3, jnp.bfloat16)}, "state": {}, "frozen": {}}, loss, {}, spec)
    learner = gradient(task, optax.sgd(0.1), watch={"w": "w"})
    contracts.check_learner(learner)
    state, metrics = stepped(learner, started(learner), {"x": jnp.ones((4, 3), jnp.bfloat16)})
    assert state["params"]["w"].dtype == jnp.bfloat16 and metrics["grad_norm"][0].dtype == jnp.float32
    assert metrics["grad_norm"][0] == np.float32(6 * np.sqrt(3))


def test_optimizer_state_and_memory_are_laid_out_as_their_params():
    def remembering(named):
        return Estimate(
            lambda task, variables, key: {"last": jax.tree.map(jnp.zeros_like, variables["params"])},
            lambda m, t, v, b, k: (*exact().grads({}, t, v, b, k)[:3], m),
            (lambda task, memory: jax.tree.map(lambda _: jax.P("mine"), memory)) if named else None,
        )

    axes = gradient(TASK, optax.adam(0.1), remembering(False)).axes
    assert axes["opt"][0].mu == axes["params"] == axes["memory"]["last"] and axes["opt"][0].count == jax.P()
    with pytest.raises(contracts.ContractError, match=r"estimate.axes: last/linear/bias: expected at most 0 names"):
        gradient(TASK, optax.adam(0.1), remembering(True))


def test_estimates_compose_under_the_learner():
    plain, _ = trained(gradient(TASK, optax.sgd(0.1), sharpness_aware(0.05)), 3)
    split, _ = trained(gradient(TASK, optax.sgd(0.1), sharpness_aware(0.05, accumulated(4))), 3)
    close(plain, split)


def test_nan_in_the_mask_is_not_taken_for_no_weight():
    for estimate in (exact(), accumulated(4)):
        learner = gradient(TASK, optax.sgd(0.1), estimate)
        state, metrics = stepped(learner, started(learner), a_batch(mask=[jnp.nan] + [1] * 7))
        assert np.isnan(metrics["loss"][1]) and np.isnan(state["params"]["linear"]["bias"])


def test_an_optimizer_may_keep_a_random_key():
    learner = gradient(TASK, optax.chain(optax.sgd(0.1), optax.add_noise(0.1, 0.5, jax.random.key(0))))
    contracts.check_learner(learner)
    a, b = (jax.jit(learner.step)(started(learner), a_batch(), KEY)[0] for _ in range(2))
    same(a["params"], b["params"])
