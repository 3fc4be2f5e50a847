"""Estimates of long episodes from short truncations, on problems where the exact gradient is known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.mesh import entered, make_layout
from research.core.tree import joined, leaves_with_paths
from research.estimates import es, exact, noise_reuse, pes, truncated
from research.estimates._example import leaking_state, linear_regression
from research.estimates._particles import first_left, lengths
from research.tasks.influence_balancing import influence_balancing

KEY = jax.random.key(0)
T = 200
WHOLE, SHORT = influence_balancing(T), influence_balancing(1)
FULL = 28.0426  # the gradient of all T steps
LEAKING, LINE = leaking_state(), linear_regression()
VARIABLES = jax.jit(LEAKING.init)(KEY)
QUIET = {**VARIABLES, "frozen": {"noise": jnp.zeros(2)}}  # its loss depends on no key
EXACT, SLOW = exact(), pytest.mark.slow
PES, REUSE, TRUNCATED = pes(0.1, 8, 3), noise_reuse(0.1, 8, 3), truncated(3, problems=8)


COMPILED = {}


def compiled(estimate, task=LEAKING):
    """(init, grads) of variables, batch and key, one program for all tests."""
    both = jax.jit(lambda v: estimate.init(task, v, KEY)), jax.jit(lambda m, v, b, k: estimate.grads(m, task, v, b, k))
    return COMPILED.setdefault((estimate.grads, task.loss), both)


def over_an_episode(estimate, repeats, burn_in=0):
    """(mean, standard error) of the gradients of T calls of one step, over independent repeats."""
    variables = SHORT.init(KEY)

    def once(key):
        def call(memory, key):
            _, _, gradients, memory = estimate.grads(memory, SHORT, variables, {}, key)
            return memory, gradients["theta"]

        memory = estimate.init(SHORT, variables, key)
        return jax.lax.scan(call, memory, jax.random.split(key, burn_in + T))[1][burn_in:].mean()

    found = np.asarray(jax.jit(lambda: jax.lax.map(once, jax.random.split(jax.random.key(5), repeats)))())
    return found.mean(), found.std(ddof=1) / repeats**0.5 if repeats > 1 else 0.0


def test_the_exact_gradient_of_influence_balancing_is_the_published_problems():
    assert float(exact().grads({}, WHOLE, WHOLE.init(KEY), {}, KEY)[2]["theta"]) == pytest.approx(FULL, abs=1e-3)


@pytest.mark.parametrize("staggered", [False, True])
def test_truncated_backpropagation_has_the_wrong_sign(staggered):
    """It sees only x_0 of the step itself, which theta pulls up: -2.355, whatever the age of the problems."""
    mean, _ = over_an_episode(truncated(T, problems=T if staggered else 1, staggered=staggered), 1, burn_in=T * staggered)
    assert mean == pytest.approx(-2.355, abs=1e-3)


def test_truncated_es_has_the_bias_of_truncated_backpropagation():
    mean, error = over_an_episode(truncated(T, es(0.1, 10), problems=50, staggered=False), 4)
    assert abs(mean + 2.355) < 5 * error + 0.01 and error < 0.02


@pytest.mark.parametrize("make", [pes, noise_reuse])
def test_persistent_and_reused_noise_are_unbiased(make):
    """6 standard errors, which are themselves a small part of the truth."""
    mean, error = over_an_episode(make(0.1, 400, T, staggered=False), 8)
    assert error < 1.5 and abs(mean - FULL) < 6 * error


@pytest.mark.slow
def test_persistent_noise_is_unbiased_over_problems_of_all_ages():
    """Each call sees all ages, after the first episodes, which are short."""
    mean, error = over_an_episode(pes(0.1, 500, T), 8, burn_in=T)
    assert error < 1.5 and abs(mean - FULL) < 6 * error


def test_es_is_the_gradient_of_a_quadratic_loss_and_reports_the_parameters_themselves():
    variables, inputs = LINE.init(KEY), jax.random.normal(jax.random.key(1), (8, 3))
    batch = {"inputs": inputs, "targets": inputs.sum(1) + 1, "mask": jnp.ones(8).at[3].set(0)}
    loss, own, expected, _ = compiled(EXACT, LINE)[1]({}, variables, batch, KEY)
    value, aux, found, _ = compiled(es(0.05, 20_000), LINE)[1]({}, variables, batch, KEY)
    size = np.sqrt(sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(expected)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=6 * size * 2 / 20_000**0.5)  # a coordinate's deviation is at most 2 |g|
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), (value, aux), (loss, own))
    assert aux.weight == 7 and int(aux.state["seen"]) == 7


def test_es_of_a_batch_that_counts_nothing_is_zero():
    batch = {"inputs": jnp.ones((8, 3)), "targets": jnp.ones(8), "mask": jnp.zeros(8)}
    value, aux, found, _ = compiled(es(0.1, 3), LINE)[1]({}, LINE.init(KEY), batch, KEY)
    assert value == 0 and aux.weight == 0 and not any(g.any() for g in jax.tree.leaves(found))


@pytest.mark.slow
def test_es_needs_no_derivative():
    """A loss that is a step function, which `exact` sees as flat."""
    flat = LINE._replace(loss=lambda v, b, k: (lambda value, aux: (jnp.round(value * 100) / 100, aux))(*LINE.loss(v, b, k)))
    batch = {"inputs": jnp.ones((8, 3)), "targets": jnp.zeros(8), "mask": jnp.ones(8)}

    def slope(estimate, task):
        return float(compiled(estimate, task)[1]({}, LINE.init(KEY), batch, KEY)[2]["linear"]["bias"])

    assert slope(EXACT, flat) == 0
    assert slope(es(0.3, 4000), flat) == pytest.approx(slope(EXACT, LINE), rel=0.3)


def remembered(estimate, calls, task=LEAKING):
    """Memories before each call and after the last."""
    init, grads = compiled(estimate, task)
    memories = [init(VARIABLES)]
    for i in range(calls):
        memories.append(grads(memories[-1], VARIABLES, {}, jax.random.fold_in(KEY, i))[-1])
    return jax.device_get(memories)


def test_persistent_noise_adds_up_within_an_episode_and_begins_again_with_the_next():
    """3 calls an episode: the second and third add a fresh draw of standard deviation sigma, the fourth begins anew."""
    memories = remembered(pes(0.1, 500, 3, staggered=False), 4)
    kept = [np.asarray(m["noise"]["rate"]) for m in memories]
    assert [int(m["left"][0]) for m in memories] == [0, 2, 1, 0, 2]
    spreads = [kept[1].std(), (kept[2] - kept[1]).std(), (kept[3] - kept[2]).std(), kept[4].std()]
    np.testing.assert_allclose(spreads, 0.1, rtol=0.1)
    assert kept[3].std() == pytest.approx(0.1 * 3**0.5, rel=0.1)
    assert abs(np.corrcoef(kept[4].ravel(), kept[3].ravel())[0, 1]) < 0.2


def test_reused_noise_stays_for_an_episode_and_changes_with_the_next():
    memories = remembered(noise_reuse(0.1, 50, 3, staggered=False), 4)
    kept = [np.asarray(m["noise"]["rate"]) for m in memories]
    assert (kept[1] == kept[2]).all() and (kept[2] == kept[3]).all() and (kept[4] != kept[3]).all()


@pytest.mark.parametrize("estimate", [PES, pytest.param(REUSE, marks=SLOW)])
def test_pairs_begin_together_and_reset_together(estimate):
    memories = remembered(estimate, 4)
    for memory in memories:
        x, t = (np.asarray(memory["states"][name]) for name in ("x", "t"))
        assert (t[:, 0] == t[:, 1]).all()
        fresh = t[:, 0] == 0
        assert (x[fresh, 0] == x[fresh, 1]).all()
    assert (np.asarray(memories[-1]["states"]["t"])[:, 0] <= 2 * 3).all()


def test_first_episodes_end_after_different_numbers_of_calls():
    left = np.asarray(first_left(5, KEY, 10, True))
    assert left.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4] and not np.asarray(first_left(5, KEY, 10, False)).any()


def test_lengths_of_episodes_are_log_uniform_with_both_ends():
    drawn = np.asarray(lengths((2, 6), KEY, 20_000))
    share = np.bincount(drawn, minlength=7)[2:] / 20_000
    expected = np.diff(np.log(np.arange(2, 8))) / np.log(7 / 2)
    np.testing.assert_allclose(share, expected, atol=0.02)
    assert set(np.asarray(lengths(5, KEY, 100)).tolist()) == {5}


@pytest.mark.parametrize("estimate", [PES, pytest.param(REUSE, marks=SLOW)])
def test_loss_and_metrics_are_those_of_an_unperturbed_problem(estimate):
    """Started where the memory's own unperturbed problem stands, theta itself gives the loss that is told."""
    init, grads = compiled(estimate)
    memory = grads(init(QUIET), QUIET, {}, KEY)[-1]
    value, aux, _, _ = grads(memory, QUIET, {}, jax.random.key(1))
    loss, own, _, _ = compiled(EXACT)[1]({}, {**QUIET, "state": memory["itself"]["state"]}, {}, KEY)
    np.testing.assert_allclose(value, loss, rtol=1e-6)
    np.testing.assert_allclose(aux.metrics["last"], own.metrics["last"], rtol=1e-6)
    assert aux.metrics["perturbed"][1] == 16 and aux.metrics["perturbed"][0] != 16 * value
    jax.tree.map(np.testing.assert_array_equal, aux.state, QUIET["state"])


def test_truncated_goes_on_from_call_to_call_and_begins_afresh():
    memories = remembered(TRUNCATED, 7)
    ages = np.stack([np.asarray(m["state"]["t"]) for m in memories]) // 2
    assert ages.max() == 3 and (np.diff(ages, axis=0)[ages[:-1] < 3] <= 1).all()
    assert (ages[-1] != ages[-1][0]).any(), "staggered problems are of different ages"


def test_truncated_averages_its_problems():
    """The gradient is the mean of the problems', loss and metrics too."""
    init, grads = compiled(TRUNCATED)
    memory = grads(init(QUIET), QUIET, {}, KEY)[-1]
    going = np.asarray(memory["left"]) > 0  # the others begin afresh, and are looked at in the memory after the call
    value, aux, found, after = grads(memory, QUIET, {}, KEY)
    one = compiled(EXACT)[1]

    def each(i):
        state = jax.tree.map(lambda x: x[i], memory["state"]) if going[i] else fresh(after, i)
        return one({}, {**QUIET, "state": state}, {}, KEY)

    alone = [each(i) for i in range(8)]
    np.testing.assert_allclose(value, np.mean([a[0] for a in alone]), rtol=1e-5)
    np.testing.assert_allclose(found["rate"], np.mean([a[2]["rate"] for a in alone], 0), rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["last"][0], sum(a[1].metrics["last"][0] for a in alone), rtol=1e-5)
    assert aux.metrics["last"][1] == 8 and aux.weight is None


def fresh(after, i):
    """The state that problem i began with, two quiet steps back: x <- 0.9 x + 0.1 (1 - x)."""
    x = (after["state"]["x"][i] - 0.1) / 0.8
    return {"x": (x - 0.1) / 0.8, "t": jnp.zeros((), jnp.int32)}


@pytest.mark.parametrize("estimate", [PES, pytest.param(TRUNCATED, marks=SLOW), pytest.param(REUSE, marks=SLOW)])
def test_particles_lie_over_the_mesh_and_frozen_is_shared(estimate):
    """On 4 devices each has a quarter of the particles, and the gradient is that of one device. No particle has a frozen of
    its own."""
    init, grads = compiled(estimate)
    memory = init(VARIABLES)
    assert not any("frozen" in path for path, _ in leaves_with_paths(memory))
    layout = make_layout({"data": 4})
    alone = grads(memory, VARIABLES, {}, KEY)
    with entered(layout):
        placed = jax.device_put(memory, layout.shardings(estimate.axes(LEAKING, memory), memory, "memory"))
        spread = jax.jit(lambda m, v, k: estimate.grads(m, LEAKING, v, {}, k))(placed, VARIABLES, KEY)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), alone, spread)
    for path, x in leaves_with_paths(spread[-1]):
        if path[0] != "itself" and x.ndim:
            assert x.addressable_shards[0].data.shape[0] == x.shape[0] // 4, joined(path)


def test_particles_that_do_not_divide_are_refused():
    estimate = pes(0.1, 6, 3)
    memory = jax.eval_shape(lambda: estimate.init(LEAKING, VARIABLES, KEY))
    with pytest.raises(ValueError, match=r"dimension 0 \(particles\) of 6 is not divisible by mesh data=4"):
        make_layout({"data": 4}).shardings(estimate.axes(LEAKING, memory), memory, "memory")


def test_bad_arguments_are_refused_in_one_line():
    cases = [
        (lambda: es(0.0, 3), "es: sigma=0.0, pairs=3; allowed: sigma above 0, pairs 1 or more"),
        (lambda: pes(0.1, 0, 3), "pes: sigma=0.1, pairs=0; allowed: sigma above 0, pairs 1 or more"),
        (lambda: pes(0.1, 2, 0), "pes: horizon=0; allowed: calls an episode lasts, 1 or more, or (least, most) of them"),
        (lambda: noise_reuse(0.1, 2, (4, 2)), "noise_reuse: horizon=(4, 2); allowed: calls an episode lasts"),
        (lambda: truncated(2.5), "truncated: horizon=2.5; allowed: calls an episode lasts"),
        (lambda: truncated(2, problems=0), "truncated: problems=0; allowed: 1 or more"),
    ]
    for act, said in cases:
        with pytest.raises(ValueError) as error:
            act()
        assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_a_task_with_a_weight_keeps_it():
    """truncated weighs its problems by Aux.weight."""
    batch = {"inputs": jnp.ones((8, 3)), "targets": jnp.zeros(8), "mask": jnp.ones(8).at[0].set(0)}
    (init, grads), variables = compiled(truncated(2, problems=3), LINE), LINE.init(KEY)
    value, aux, found, _ = grads(init(variables), variables, batch, KEY)
    loss, _, expected, _ = compiled(EXACT, LINE)[1]({}, variables, batch, KEY)
    np.testing.assert_allclose(value, loss, rtol=1e-6)
    np.testing.assert_allclose(found["linear"]["bias"], expected["linear"]["bias"], rtol=1e-6)
    assert aux.weight == 21
