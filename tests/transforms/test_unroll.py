"""The training of an inner problem as a task: the same steps as by hand, from where the state stands."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core.batches import nothing
from research.core.checkpoint import Checkpoints
from research.core.loop import fit
from research.core.tree import leaves_with_paths
from research.core.types import LearnedOptimizer
from research.estimates import pes, truncated
from research.learners import gradient
from research.optim.learned import learned_scales
from research.tasks.families import linear_regressions, mnist1d_mlps, quadratic_bowls
from research.transforms import unroll

KEY = jax.random.key(0)
FAMILY = quadratic_bowls(3, noise=0.1)
ADAM = learned_scales(learning_rate=0.05)
TASK = unroll(FAMILY, ADAM, 4, horizon=40)
VARIABLES = jax.jit(TASK.init)(KEY)
LOSS = jax.jit(TASK.loss)


def by_hand(state, theta, key, steps):
    """(params, losses) of steps of the inner problem, in a Python loop."""
    task, tx = FAMILY.task(state["problem"]), ADAM.transformation(theta)
    inner, losses = state["inner"], []
    params, opt = inner["params"], tx.init(inner["params"])

    @jax.jit
    def step(params, opt, i):
        k_batch, k_loss = jax.random.split(jax.random.fold_in(key, i))
        batch = FAMILY.batch(state["problem"], {}, k_batch)
        value, grads = jax.value_and_grad(lambda p: task.loss({**inner, "params": p}, batch, k_loss)[0])(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, value

    for i in range(steps):
        params, opt, value = step(params, opt, i)
        losses.append(value)
    return params, losses


def test_an_unroll_is_its_steps_by_hand():
    value, aux = LOSS(VARIABLES, {}, KEY)
    params, losses = by_hand(VARIABLES["state"], VARIABLES["params"], KEY, 4)
    np.testing.assert_allclose(aux.state["inner"]["params"]["x"], params["x"], rtol=1e-5)
    np.testing.assert_allclose(value, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["final"][0], losses[-1], rtol=1e-5)
    assert int(aux.state["t"]) == 4 and aux.weight is None
    jax.tree.map(np.testing.assert_array_equal, aux.state["problem"], VARIABLES["state"]["problem"])


def test_it_goes_on_from_where_the_state_stands():
    """Two truncations are not one twice: the moments and the count of steps of the optimizer go on too."""
    _, aux = LOSS(VARIABLES, {}, KEY)
    _, after = LOSS({**VARIABLES, "state": aux.state}, {}, KEY)
    assert int(after.state["t"]) == 8 and int(after.state["opt"]["t"]) == 8
    assert not np.array_equal(after.state["inner"]["params"]["x"], aux.state["inner"]["params"]["x"])


def test_predict_is_a_curve_of_a_fresh_problem_that_training_brings_down():
    curves = jax.jit(jax.vmap(lambda k: TASK.methods["predict"].apply(VARIABLES, {}, k)["loss"]))(jax.random.split(KEY, 8))
    assert curves.shape == (8, 40) and curves.dtype == jnp.float32
    assert (curves[:, -5:].mean() < 0.5 * curves[:, :5].mean()) and len(set(curves[:, 0].tolist())) == 8


def test_data_of_the_family_is_frozen_once_however_many_particles_there_are():
    family = mnist1d_mlps(4, hidden=[3])
    task = unroll(family, ADAM, 2)
    variables = jax.eval_shape(task.init, KEY)
    assert {x.shape for x in jax.tree.leaves(variables["frozen"])} == {(4000, 40), (4000,)}
    memory = jax.eval_shape(lambda: pes(0.1, 5, 3).init(task, task.init(KEY), KEY))
    assert not any(4000 in x.shape for x in jax.tree.leaves(memory))
    assert all(isinstance(part, str) for path, _ in leaves_with_paths(variables) for part in path)


def test_a_loss_that_blows_up_counts_as_the_highest():
    wild = learned_scales(base="momentum", learning_rate=1e20)
    task = unroll(FAMILY, wild, 12, highest=2.5)
    value, aux = jax.jit(task.loss)(jax.jit(task.init)(KEY), {}, KEY)
    assert jnp.isfinite(value) and value <= 2.5 and aux.metrics["final"][0] == 2.5


def test_the_same_program_for_any_number_of_steps():
    sizes = {n: len(jax.jit(unroll(FAMILY, ADAM, n).loss).lower(VARIABLES, {}, KEY).as_text().splitlines()) for n in (2, 200)}
    assert sizes[2] == sizes[200]


def test_bad_arguments_are_refused_in_one_line():
    broken = FAMILY._replace(batch=lambda problem, data, key: {"noise": jnp.zeros(4)})
    cases = [
        (lambda: unroll(FAMILY, ADAM, 0), "unroll: length=0; allowed: 1 or more"),
        (lambda: unroll(FAMILY, ADAM, 2, horizon=0), "unroll: horizon=0; allowed: 1 or more"),
        (lambda: unroll(FAMILY, ADAM, 2, highest=float("nan")), "unroll: highest=nan; allowed: a finite loss, or None"),
        (
            lambda: unroll(FAMILY, optax.identity(), 2),
            "unroll: learned is a GradientTransformation; allowed: a LearnedOptimizer, such as learned_scales() of "
            "research.optim.learned",
        ),
        (lambda: unroll(broken, ADAM, 2), "family.batch: noise: expected float32[3], got float32[4]"),
    ]
    for act, said in cases:
        with pytest.raises(ValueError) as error:
            act()
        assert str(error.value) == said


RATE = LearnedOptimizer(lambda key: {"log_rate": jnp.full((), -6.0)}, lambda theta: optax.scale(-jnp.exp(theta["log_rate"])))


@pytest.mark.slow
@pytest.mark.parametrize("estimate", [pes(0.3, 16, 4), truncated(4, problems=8)], ids=["pes", "truncated"])
def test_a_rate_that_is_much_too_low_is_learned_to_be_higher_and_resumes_bit_for_bit(estimate, tmp_path):
    """exp(-6) to above exp(-4.5) in 20 steps through `fit`; killed in the middle, it goes on to the same bits."""
    task = unroll(linear_regressions(8, 4), RATE, 5)
    learner = gradient(task, optax.adam(0.1), estimate)
    whole = fit(learner, nothing(), 20, key=KEY, log_every=10, steps_per_call=5)
    assert float(whole["params"]["log_rate"]) > -4.5
    half = fit(learner, nothing(), 10, key=KEY, log_every=10, steps_per_call=5)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(half)
    back = checkpoints.load(checkpoints.latest(), jax.eval_shape(learner.init, KEY))
    checkpoints.close()
    again = fit(learner, nothing(), 20, key=KEY, log_every=10, steps_per_call=5, state=back)
    jax.tree.map(np.testing.assert_array_equal, whole, again)
