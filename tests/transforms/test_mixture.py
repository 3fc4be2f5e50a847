"""Several tasks, one set of params."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core import contracts
from research.estimates import accumulated, exact
from research.learners import gradient
from research.transforms import mixture
from research.transforms._example import small_classifier

KEY = jax.random.key(0)
ONE, TWO = small_classifier(batch=4), small_classifier(batch=4, classes=2)
SAME = {"a": (ONE, 1.0), "b": (ONE, 0.25)}
HEADS = {"a": (ONE, 1.0), "b": (TWO, 0.25)}


def batch(seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: {
            "inputs": jnp.asarray(rng.standard_normal((4, 3)), jnp.float32),
            "targets": jnp.asarray(rng.integers(0, 2, 4), jnp.int32),
            "mask": jnp.asarray(mask, jnp.float32),
        }
        for name, mask in (("a", [1, 1, 0, 1]), ("b", [1, 0, 0, 0.5]))
    }


def parts(variables, name, private=False):
    params = variables["params"]
    if private:
        params = {"trunk": params["trunk"], "head": params[name]["head"]}
    return {"params": params, "state": variables["state"][name], "frozen": variables["frozen"][name]}


def test_equal_tasks_share_all_params_and_keep_their_state():
    mixed = mixture(SAME)
    variables = mixed.init(KEY)
    assert jax.tree.structure(variables["params"]) == jax.tree.structure(ONE.init(KEY)["params"])
    assert set(variables["state"]) == set(variables["frozen"]) == {"a", "b"}
    _, aux = mixed.loss(variables, batch(), KEY)
    assert [int(aux.state[n]["inputs"]["seen"]) for n in "ab"] == [3, 2]


def test_private_paths_stay_apart_and_the_rest_is_shared():
    mixed = mixture(HEADS, private="^head")
    params = mixed.init(KEY)["params"]
    assert set(params) == {"trunk", "a", "b"} and set(params["a"]) == {"head"}
    assert params["a"]["head"]["kernel"].shape == (4, 3) and params["b"]["head"]["kernel"].shape == (4, 2)
    apart = mixture(SAME, private="head").init(KEY)["params"]
    assert (apart["a"]["head"]["kernel"] != apart["b"]["head"]["kernel"]).any()


def test_the_loss_is_the_weighted_sum_and_has_no_weight():
    mixed, b = mixture(HEADS, private="head"), batch()
    variables = mixed.init(KEY)
    a, c = (task.loss(parts(variables, n, True), b[n], KEY)[0] for n, (task, _) in HEADS.items())
    loss, aux = mixed.loss(variables, b, KEY)
    np.testing.assert_allclose(loss, a + 0.25 * c, rtol=1e-6)
    assert aux.weight is None
    with pytest.raises(ValueError, match="no weighted mean"):
        accumulated(2).grads({}, mixed, variables, b, KEY)


def test_per_example_it_is_a_pooled_mean_and_splits_exactly():
    mixed, b = mixture(SAME, per="example"), batch()
    variables = mixed.init(KEY)
    (a, c), (wa, wc) = zip(
        *((x[0], x[1].weight) for x in (ONE.loss(parts(variables, n), b[n], KEY) for n in "ab")), strict=True
    )
    loss, aux = mixed.loss(variables, b, KEY)
    np.testing.assert_allclose([loss, aux.weight], [(wa * a + 0.25 * wc * c) / (wa + 0.25 * wc), wa + 0.25 * wc], rtol=1e-6)
    whole, split = (e.grads({}, mixed, variables, b, KEY) for e in (exact(), accumulated(2)))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), (whole[0], whole[2]), (split[0], split[2])
    )


def test_shared_params_take_the_gradients_of_all_tasks():
    mixed, b = mixture(HEADS, private="head"), batch()
    variables = mixed.init(KEY)
    found = exact().grads({}, mixed, variables, b, KEY)[2]
    own = []
    for name, (task, _) in HEADS.items():
        v = parts(variables, name, True)
        own.append(jax.grad(lambda p, task=task, v=v, name=name: task.loss({**v, "params": p}, b[name], KEY)[0])(v["params"]))
    expected = own[0]["trunk"]["kernel"] + 0.25 * own[1]["trunk"]["kernel"]
    np.testing.assert_allclose(found["trunk"]["kernel"], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["b"]["head"]["bias"], 0.25 * own[1]["head"]["bias"], rtol=1e-4, atol=1e-6)


def test_metrics_methods_merge_and_axes_carry_the_tasks_names():
    mixed, b = mixture(HEADS, private="head"), batch()
    contracts.check_task(mixed)
    variables = mixed.init(KEY)
    _, aux = mixed.loss(variables, b, KEY)
    assert set(aux.metrics) == {"a/nll", "a/loss", "b/nll", "b/loss"}
    np.testing.assert_allclose(aux.metrics["b/loss"][0], aux.metrics["b/nll"][0], rtol=1e-6)
    assert set(mixed.methods) == {"a/predict", "b/predict"}
    found = mixed.methods["b/predict"].apply(variables, {"inputs": b["b"]["inputs"]}, KEY)
    np.testing.assert_allclose(found, TWO.methods["predict"].apply(parts(variables, "b", True), b["b"], KEY), rtol=1e-6)
    assert mixed.merge == {"a/inputs/seen": "sum", "b/inputs/seen": "sum"}
    assert mixed.axes["params"]["trunk"] == ONE.axes["params"]["trunk"]


def test_it_trains_both_tasks_at_once():
    learner = gradient(mixture(HEADS, private="head"), optax.adam(0.05))
    state, step = learner.init(KEY), jax.jit(learner.step)
    seen = []
    for _ in range(60):
        state, metrics = step(state, batch(), KEY)
        seen.append([float(metrics[f"{n}/loss"][0] / metrics[f"{n}/loss"][1]) for n in "ab"])
    assert (np.array(seen[-1]) < 0.5 * np.array(seen[0])).all()


def _bare(task):
    return task._replace(loss=lambda *a: (task.loss(*a)[0], task.loss(*a)[1]._replace(weight=None)))


@pytest.mark.parametrize(
    "tasks, options, message",
    [
        ({}, {}, "mixture: weights {}; allowed"),
        ({"a": (ONE, -1.0)}, {}, "mixture: weights {'a': -1.0}; allowed: 0 or more"),
        ({"a": (ONE, 0.0)}, {}, "at least one above 0"),
        (HEADS, {}, r"params head/bias is float32\[3\] in a and float32\[2\] in b; allowed: equal, or private"),
        (HEADS, {"private": "haed"}, "params head/bias"),
        (SAME, {"private": "haed"}, "mixture: private='haed' is in no path of params"),
        (SAME, {"private": "(h"}, "mixture: private='\\(h' is no regular expression"),
        ({"head": (ONE, 1.0)}, {}, "mixture: the name 'head' is also the first key of params head/bias"),
        (SAME, {"per": "exmple"}, "mixture: per='exmple' is unknown; allowed: example, task; nearest: 'example'"),
        ({"a": (_bare(ONE), 1.0)}, {"per": "example"}, 'the loss of a is no weighted mean .*; use per="task"'),
    ],
)
def test_what_cannot_be_mixed_is_refused_in_one_line(tasks, options, message):
    with pytest.raises(ValueError, match=message) as error:
        mixture(tasks, **options)
    assert "\n" not in str(error.value)


def test_axes_that_disagree_are_refused():
    other = ONE._replace(axes={**ONE.axes, "params": {**ONE.axes["params"], "trunk": {"kernel": jax.P("embed", None)}}})
    with pytest.raises(ValueError, match="axes of params trunk/kernel are .* in a and .* in b; expected equal ones"):
        mixture({"a": (ONE, 1.0), "b": (other, 1.0)})
