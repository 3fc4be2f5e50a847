"""A batch of tasks against the tasks one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core.types import Spec
from research.estimates import accumulated, exact
from research.learners import gradient
from research.transforms import drawn, over_tasks
from research.transforms._example import small_classifier
from research.transforms._trees import nested_axis

KEY = jax.random.key(0)
TASK, N = small_classifier(batch=4), 3
VARIABLES = TASK.init(KEY)


def batch(n=N, rows=4, seed=0, masks=None):
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 2, (n, rows)) if masks is None else masks
    return {
        "inputs": jnp.asarray(rng.standard_normal((n, rows, 3)), jnp.float32),
        "targets": jnp.asarray(rng.integers(0, 3, (n, rows)), jnp.int32),
        "mask": jnp.asarray(mask, jnp.float32).at[0, 0].set(1.0),
    }


def one(b, i):
    return jax.tree.map(lambda x: x[i], b)


def close(a, b, rtol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), a, b)


def test_loss_weight_and_metrics_are_those_of_the_pooled_examples():
    many, b = over_tasks(TASK, N), batch()
    loss, aux = many.loss(VARIABLES, b, KEY)
    pooled = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), b)
    expected, expected_aux = TASK.loss(VARIABLES, pooled, KEY)
    close((loss, aux.weight, dict(aux.metrics)), (expected, expected_aux.weight, dict(expected_aux.metrics)))


def test_gradients_are_the_weighted_mean_of_the_tasks_gradients():
    many, b = over_tasks(TASK, N), batch()
    found = exact().grads({}, many, VARIABLES, b, KEY)[2]
    each = [exact().grads({}, TASK, VARIABLES, one(b, i), KEY) for i in range(N)]
    total = sum(aux.weight for _, aux, _, _ in each)
    close(
        found,
        jax.tree.map(lambda *gs: sum(g * e[1].weight for g, e in zip(gs, each, strict=True)) / total, *[e[2] for e in each]),
    )


def test_states_are_merged_by_the_tasks_rules():
    b = batch()
    _, aux = over_tasks(TASK, N).loss(VARIABLES, b, KEY)
    states = [TASK.loss(VARIABLES, one(b, i), KEY)[1] for i in range(N)]
    weights = np.array([float(s.weight) for s in states])
    mean = sum(w * s.state["inputs"]["mean"] for w, s in zip(weights, states, strict=True)) / weights.sum()
    close(aux.state["inputs"]["mean"], mean)
    assert aux.state["inputs"]["seen"] == int((b["mask"] > 0).sum())


def test_losses_without_a_weight_count_one_each():
    bare = TASK._replace(loss=lambda *a: (TASK.loss(*a)[0], TASK.loss(*a)[1]._replace(weight=None)))
    b = batch()
    loss, aux = over_tasks(bare, N).loss(VARIABLES, b, KEY)
    assert aux.weight == N
    np.testing.assert_allclose(loss, np.mean([TASK.loss(VARIABLES, one(b, i), KEY)[0] for i in range(N)]), rtol=1e-5)


def test_a_masked_task_counts_nothing():
    b = batch(masks=np.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 1]]))
    rest = jax.tree.map(lambda x: x[jnp.array([0, 2])], b)
    (found, aux), (expected, expected_aux) = (over_tasks(TASK, n).loss(VARIABLES, x, KEY) for n, x in ((3, b), (2, rest)))
    close((found, aux.weight, aux.state), (expected, expected_aux.weight, expected_aux.state))
    none = over_tasks(TASK, N).loss(VARIABLES, {**b, "mask": jnp.zeros((N, 4))}, KEY)
    assert none[0] == 0 and none[1].weight == 0
    jax.tree.map(np.testing.assert_array_equal, none[1].state, VARIABLES["state"])


def test_it_can_be_split_by_tasks():
    many, b = over_tasks(TASK, 4), batch(4, seed=1)
    whole = exact().grads({}, many, VARIABLES, b, KEY)
    parts = accumulated(2).grads({}, many, VARIABLES, b, KEY)
    close((whole[0], whole[1].weight, whole[2]), (parts[0], parts[1].weight, parts[2]))


def test_every_task_has_a_key_of_its_own():
    noisy = TASK._replace(loss=lambda v, b, key: (jax.random.normal(key), TASK.loss(v, b, key)[1]._replace(weight=None)))
    b = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), batch())
    draws = [float(over_tasks(noisy, n).loss(VARIABLES, jax.tree.map(lambda x, n=n: x[:n], b), KEY)[0]) * n for n in (1, 2, 3)]
    assert len({round(x, 4) for x in np.diff([0, *draws])}) == 3


def test_methods_map_over_tasks():
    many, b = over_tasks(TASK, N), batch()
    found = many.methods["predict"].apply(VARIABLES, {"inputs": b["inputs"]}, KEY)
    assert found.shape == (N, 4, 3)
    for i in range(N):
        close(found[i], TASK.methods["predict"].apply(VARIABLES, {"inputs": b["inputs"][i]}, KEY))


def test_the_inner_batch_axis_is_renamed_however_deep():
    deep = over_tasks(over_tasks(TASK, 2), 5)
    assert deep.batch["inputs"] == Spec((5, 2, 4, 3), jnp.float32, ("batch", "inner_batch", "inner_inner_batch", "features"))
    assert deep.methods["predict"].inputs["inputs"].axes == deep.batch["inputs"].axes
    assert [nested_axis(a) for a in (None, "length", "minibatch", "inner_length")] == [
        None,
        "length",
        "minibatch",
        "inner_length",
    ]


def test_it_trains_as_a_task():
    learner = gradient(over_tasks(TASK, N), optax.sgd(0.5))
    state, step = learner.init(KEY), jax.jit(learner.step)
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch(masks=np.ones((N, 4))), KEY)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert losses[-1] < 0.7 * losses[0]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="over_tasks: n=0; allowed: 1 or more"):
        over_tasks(TASK, 0)
    with pytest.raises(
        ValueError, match=r"over_tasks: the leaves of a batch must share their first axis, got \[\(2,\), \(3,\)\]"
    ):
        over_tasks(TASK, N).loss(VARIABLES, {**batch(), "mask": jnp.ones((2, 4))}, KEY)
    empty = drawn(TASK, lambda data, key: one(batch(), 0))
    with pytest.raises(ValueError, match=r"over_tasks: the task's batch is \{\}.*drawn\(over_tasks\(task, 3\), draw\)"):
        over_tasks(empty, N)
