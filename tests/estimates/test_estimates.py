"""Each estimate gives the gradient that its paper or name says, on data where that can be written down."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core.types import Aux, Estimate, Spec, Task
from research.estimates import accumulated, clipped_per_example, exact, sharpness_aware
from research.estimates._example import linear_regression

KEY = jax.random.key(0)
TASK = linear_regression(batch=8, features=3)
VARIABLES = TASK.init(KEY)


def a_batch(mask=(1,) * 8, rows=8):
    inputs = jax.random.normal(jax.random.key(1), (rows, 3))
    return {"inputs": inputs, "targets": inputs.sum(1) + 1, "mask": jnp.asarray(mask, jnp.float32)}


COMPILED = {}  # one program an estimate and loss, so that tests share them
EXACT, CLIPPED, ACCUMULATED = exact(), clipped_per_example(1.0), {n: accumulated(n) for n in (1, 2, 4, 8)}
SHARP = sharpness_aware(0.1)


def run(estimate, batch, task=TASK, variables=VARIABLES, key=KEY):
    """(loss, Aux, gradients, memory), compiled."""
    grads = jax.jit(lambda m, v, b, k: estimate.grads(m, task, v, b, k))
    return COMPILED.setdefault((estimate.grads, task.loss), grads)(estimate.init(task, variables, key), variables, batch, key)


def close(a, b, rtol=2e-6, atol=2e-6):
    """Sums of eight float32 terms in another order: a few units in the last place."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def test_exact_is_the_gradient_of_the_loss():
    batch = a_batch()
    loss, aux, grads, memory = run(EXACT, batch)
    line, x = VARIABLES["params"]["linear"], batch["inputs"] * VARIABLES["frozen"]["scale"][None]
    residual = x @ line["kernel"] + line["bias"] - batch["targets"]
    close(grads, {"linear": {"kernel": 2 * (x * residual[:, None]).mean(0), "bias": 2 * residual.mean()}})
    close(loss, (residual**2).mean())
    assert aux.weight == 8 and memory == {}


@pytest.mark.parametrize("estimate", [EXACT, ACCUMULATED[4], CLIPPED, SHARP])
def test_a_batch_that_counts_nothing_gives_zeros_and_keeps_the_state(estimate):
    loss, aux, grads, _ = run(estimate, a_batch(mask=[0] * 8))
    assert loss == 0 and aux.weight == 0
    assert all((g == 0).all() for g in jax.tree.leaves(grads))
    if estimate in (ACCUMULATED[4], CLIPPED):  # what merges states keeps the old one; exact has what the task made of 0/0
        jax.tree.map(np.testing.assert_array_equal, aux.state, VARIABLES["state"])


@pytest.mark.parametrize("mask", [[1] * 8, [1, 0, 1, 1, 1, 0, 1, 1], [0.5, 2, 1, 0, 1, 3, 0, 0.25]])
@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_accumulated_equals_exact_with_microbatches_that_count_nothing(n, mask):
    """Rows 1 and 5 make microbatch 1 of 4, which the second mask leaves with 0/0."""
    batch = a_batch(mask)
    loss, aux, grads, _ = run(EXACT, batch)
    loss_n, aux_n, grads_n, _ = run(ACCUMULATED[n], batch)
    close((loss, aux.weight, aux.metrics, grads), (loss_n, aux_n.weight, aux_n.metrics, grads_n))


def test_accumulated_merges_state_by_the_tasks_rules():
    batch = a_batch([1, 0, 1, 1, 1, 0, 1, 1])
    (_, aux, _, _), (_, aux_n, _, _) = run(EXACT, batch), run(ACCUMULATED[4], batch)
    close(aux.state, aux_n.state)
    assert aux_n.state["seen"] == 6 and aux_n.state["largest"] == jnp.abs(batch["inputs"] * batch["mask"][:, None]).max()


def test_accumulated_cuts_by_stride():
    """Row r goes to microbatch r % n, so a batch that is laid out over devices stays where it is."""
    spec = Spec((6,), jnp.float32, ("batch",))

    def loss(variables, batch, key):
        return batch["x"].sum() * variables["params"]["w"], Aux({}, {}, jnp.full((), 2.0))

    seen = []
    spy = Estimate(
        lambda t, v, k: {},
        lambda m, t, v, b, k: (jax.debug.callback(lambda x: seen.append(x.tolist()), b["x"]), exact().grads(m, t, v, b, k))[1],
    )
    task = Task(lambda key: {"params": {"w": jnp.ones(())}, "state": {}, "frozen": {}}, loss, {}, {"x": spec})
    run(accumulated(3, spy), {"x": jnp.arange(6.0)}, task, task.init(KEY))
    jax.effects_barrier()
    assert sorted(seen) == [[0, 3], [1, 4], [2, 5]]


def test_accumulated_splits_a_batch_axis_that_is_not_the_first_and_repeats_leaves_without_one():
    specs = {"x": Spec((3, 4), jnp.float32, (None, "batch")), "shift": Spec((2,), jnp.float32, (None,))}

    def loss(variables, batch, key):
        values = (batch["x"] * variables["params"]["w"]).sum(0) + batch["shift"].sum()
        return (values**2).mean(), Aux({}, {}, jnp.full((), float(values.shape[0])))

    task = Task(lambda key: {"params": {"w": jnp.ones(())}, "state": {}, "frozen": {}}, loss, {}, specs)
    batch = {"x": jnp.arange(12.0).reshape(3, 4) / 10, "shift": jnp.ones(2)}
    (one, _, g, _), (two, _, g_n, _) = (run(e, batch, task, task.init(KEY)) for e in (EXACT, ACCUMULATED[2]))
    close((one, g), (two, g_n))


def test_accumulated_hands_the_memory_of_the_inner_from_one_microbatch_to_the_next():
    def grads(memory, task, variables, batch, key):
        loss, aux, g, _ = exact().grads({}, task, variables, batch, key)
        return loss, aux, g, {"calls": memory["calls"] + 1}

    counting = Estimate(lambda task, variables, key: {"calls": jnp.zeros((), jnp.int32)}, grads)
    assert run(accumulated(4, counting), a_batch())[3] == {"calls": 4}


def test_accumulated_sums_bfloat16_gradients_in_float32():
    specs = {"x": Spec((512,), jnp.bfloat16, ("batch",))}

    def loss(variables, batch, key):
        return (batch["x"] * variables["params"]["w"]).mean(), Aux({}, {}, jnp.full((), float(batch["x"].shape[0])))

    task = Task(lambda key: {"params": {"w": jnp.ones((), jnp.bfloat16)}, "state": {}, "frozen": {}}, loss, {}, specs)
    _, _, g, _ = run(accumulated(512), {"x": jnp.ones(512, jnp.bfloat16)}, task, task.init(KEY))
    assert g["w"] == 1 and g["w"].dtype == jnp.bfloat16


def test_what_cannot_be_split_is_refused_in_one_line():
    unweighted = TASK._replace(
        loss=lambda v, b, k: (lambda value, aux: (value, aux._replace(weight=None)))(*TASK.loss(v, b, k))
    )
    cases = [
        (lambda: run(accumulated(3), a_batch()), 'accumulated: the "batch" axis of inputs, 8, is not divisible by 3'),
        (
            lambda: run(accumulated(2), a_batch(), unweighted),
            "accumulated: the loss is no weighted mean over its batch (Aux.weight is None)",
        ),
        (lambda: run(clipped_per_example(1.0), a_batch(), unweighted), "clipped_per_example: the loss is no weighted mean"),
        (
            lambda: run(clipped_per_example(1.0, chunk=3), a_batch()),
            "clipped_per_example: the batch of 8 is not divisible by chunk=3",
        ),
        (
            lambda: run(clipped_per_example(1.0), {}, TASK._replace(batch={})),
            'clipped_per_example: no leaf of the batch has an axis named "batch"',
        ),
        (lambda: accumulated(0), "accumulated: n=0; allowed: 1 or more"),
        (lambda: sharpness_aware(-1.0), "sharpness_aware: rho=-1.0; allowed: 0 or more"),
        (lambda: clipped_per_example(0.0), "clipped_per_example: clip=0.0, noise=0.0, chunk=None; allowed: clip above 0"),
    ]
    for act, said in cases:
        with pytest.raises(ValueError) as error:
            act()
        assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_sharpness_aware_is_the_gradient_at_the_worst_point_of_the_linearised_loss():
    """Foret et al. 2021, eq. 2 and 3, written out."""
    batch, rho = a_batch(), 0.3
    _, _, g, _ = run(EXACT, batch)
    norm = np.sqrt(sum((np.asarray(x) ** 2).sum() for x in jax.tree.leaves(g)))
    moved = jax.tree.map(lambda p, d: p + rho * d / norm, VARIABLES["params"], g)
    _, _, expected, _ = run(EXACT, batch, variables={**VARIABLES, "params": moved})
    _, _, found, _ = run(sharpness_aware(rho), batch)
    close(found, expected)
    assert np.abs(found["linear"]["kernel"] - g["linear"]["kernel"]).max() > 0.05


def test_sharpness_aware_reports_the_parameters_themselves():
    batch = a_batch()
    loss, aux, _, _ = run(EXACT, batch)
    loss_s, aux_s, _, _ = run(sharpness_aware(5.0), batch)
    close((loss, aux.state, aux.metrics), (loss_s, aux_s.state, aux_s.metrics))


def test_sharpness_aware_of_accumulated_equals_that_of_exact():
    batch = a_batch([1, 0, 1, 1, 1, 0, 1, 1])
    close(run(SHARP, batch)[:3], run(sharpness_aware(0.1, accumulated(4)), batch)[:3], 1e-5, 1e-5)


def test_sharpness_aware_of_no_gradient_stays_where_it_is():
    still = TASK._replace(loss=lambda v, b, k: (lambda value, aux: (0 * value, aux))(*TASK.loss(v, b, k)))
    assert all((g == 0).all() for g in jax.tree.leaves(run(SHARP, a_batch(), still)[2]))


def test_sharpness_aware_uses_one_draw_for_both_passes_and_keeps_the_memory_of_the_first():
    def grads(memory, task, variables, batch, key):
        direction = jax.random.normal(key, ()) * (1 + memory["age"])
        loss, aux, g, _ = exact().grads({}, task, variables, batch, key)
        return loss, aux, jax.tree.map(lambda x: jnp.full_like(x, direction), g), {"age": memory["age"] + 1}

    drawing = Estimate(lambda task, variables, key: {"age": jnp.zeros((), jnp.int32)}, grads)
    _, _, g, memory = run(sharpness_aware(0.1, drawing), a_batch())
    assert memory == {"age": 1}
    close(g["linear"]["bias"], jax.random.normal(KEY, ()))


def per_example(batch):
    """The gradient of every example's own loss, one by one."""
    for r in range(8):
        one = jax.tree.map(lambda x, r=r: x[r : r + 1], batch)
        yield jax.tree.map(
            np.asarray, jax.grad(lambda p, one=one: TASK.loss({**VARIABLES, "params": p}, one, KEY)[0])(VARIABLES["params"])
        )


def test_clipped_per_example_is_the_mean_of_gradients_cut_to_length():
    """Abadi et al. 2016, algorithm 1, one example at a time."""
    batch, clip = a_batch(), 2.0
    cut, share = [], []
    for g in per_example(batch):
        norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(g)))
        cut.append(jax.tree.map(lambda x, norm=norm: x / max(1, norm / clip), g))
        share.append(norm > clip)
    expected = jax.tree.map(lambda *xs: np.mean(xs, 0), *cut)
    loss, aux, grads, _ = run(clipped_per_example(clip), batch)
    close(grads, expected)
    close((loss, aux.state), (run(EXACT, batch)[0], run(EXACT, batch)[1].state))
    assert aux.metrics["clipped"] == (sum(share), 8) and 0 < sum(share) < 8


def test_clipped_per_example_weights_examples_and_ignores_those_of_no_weight():
    batch = a_batch([1, 0, 3, 1, 1, 0, 0.5, 1])
    exactly, clipped = run(EXACT, batch), run(clipped_per_example(1e6), batch)
    close(exactly[2], clipped[2], 1e-5, 1e-5)
    close(
        (exactly[0], exactly[1].state, exactly[1].metrics["squared_error"]),
        (clipped[0], clipped[1].state, clipped[1].metrics["squared_error"]),
    )
    assert clipped[1].metrics["clipped"] == (0, 6)


@pytest.mark.parametrize("chunk", [1, 2, 8])
def test_clipped_per_example_does_not_depend_on_the_chunk(chunk):
    batch = a_batch([1, 0, 3, 1, 1, 0, 0.5, 1])
    close(run(CLIPPED, batch)[:3], run(clipped_per_example(1.0, chunk=chunk), batch)[:3])


def test_the_noise_of_clipped_per_example_has_the_papers_scale():
    """sigma * clip / batch, on 4 params over 2000 keys: a standard deviation's relative error is 1 / sqrt(16000) = 0.8%."""
    batch, noisy, plain = a_batch(), clipped_per_example(2.0, noise=1.5), run(clipped_per_example(2.0), a_batch())[2]
    keys = jax.random.split(jax.random.key(5), 2000)
    draws = jax.jit(jax.vmap(lambda k: noisy.grads({}, TASK, VARIABLES, batch, k)[2]))(keys)
    flat = np.concatenate(
        [
            (np.asarray(d) - np.asarray(p)).reshape(2000, -1)
            for d, p in zip(jax.tree.leaves(draws), jax.tree.leaves(plain), strict=True)
        ],
        1,
    )
    assert flat.std() == pytest.approx(1.5 * 2.0 / 8, rel=0.04)
    assert np.abs(flat.mean(0)).max() < 5 * 1.5 * 2.0 / 8 / np.sqrt(2000)
    assert np.abs(np.corrcoef(flat.T) - np.eye(4)).max() < 0.12  # leaves get noise of their own


def test_estimates_wrap_each_other_inside_the_gradient_of_a_chain():
    """SAM of accumulated of SAM: three deep, still a descent direction."""
    batch = a_batch()
    deep = run(sharpness_aware(0.01, accumulated(2, sharpness_aware(0.01))), batch)[2]
    g = run(EXACT, batch)[2]
    cosine = optax.tree.vdot(deep, g) / (optax.tree.norm(deep) * optax.tree.norm(g))
    assert cosine > 0.99
