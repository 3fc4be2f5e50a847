"""Prototypical and matching networks, and ridge heads: on features, against the published formulas in NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core import contracts
from research.core.types import Method, Spec, Task
from research.learners import gradient
from research.transforms import matching, over_tasks, prototypical, ridge_head
from research.transforms._example import small_classifier

KEY = jax.random.key(0)
WAYS, SHOTS, QUERIES = 3, 2, 4
HEADS = {"prototypical": prototypical, "matching": matching, "ridge_head": ridge_head}


def identity_task(features=5):
    """A task whose "predict" gives back its inputs: features are what is put in."""
    inputs = {"inputs": Spec((QUERIES, features), jnp.float32, ("batch", None))}
    methods = {"predict": Method(lambda variables, inputs, key: inputs["inputs"] + variables["params"]["shift"], inputs)}
    base = small_classifier(batch=QUERIES, features=features)
    return Task(lambda key: {"params": {"shift": jnp.zeros(())}, "state": {}, "frozen": {}}, base.loss, methods, base.batch)


def an_episode(seed=0, features=5):
    draw = np.random.default_rng(seed)
    targets = np.repeat(np.arange(WAYS), SHOTS)
    asked = draw.integers(0, WAYS, QUERIES)
    centres = draw.normal(size=(WAYS, features))

    def part(y):
        x = centres[y] + 0.5 * draw.normal(size=(len(y), features))
        return {"inputs": jnp.float32(x), "targets": jnp.int32(y), "mask": jnp.ones(len(y))}

    return {"support": part(targets), "query": part(asked)}


def predicted(task, episode, variables=None):
    inputs = {"support": episode["support"], "query": {"inputs": episode["query"]["inputs"]}}
    variables = task.init(KEY) if variables is None else variables
    return np.asarray(jax.jit(task.methods["predict"].apply)(variables, inputs, KEY))


def parts(episode):
    return *(np.asarray(episode["support"][k], np.float64) for k in ("inputs", "targets")), np.float64(
        episode["query"]["inputs"]
    )


def test_prototypes_are_means_and_logits_minus_squared_distances():
    """With one example of the first class and two of the others."""
    episode = an_episode()
    episode["support"] = {name: x[1:] for name, x in episode["support"].items()}
    x, y, q = parts(episode)
    prototypes = np.stack([x[y == k].mean(0) for k in range(WAYS)])
    expected = -((q[:, None] - prototypes[None]) ** 2).sum(-1)
    np.testing.assert_allclose(predicted(prototypical(identity_task(), WAYS, support=5), episode), expected, rtol=1e-4)


def test_attention_is_a_softmax_of_cosines():
    x, y, q = parts(an_episode())
    for temperature in (1.0, 0.1):
        cosine = (q @ x.T) / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(x, axis=1)[None] / temperature
        attention = np.exp(cosine) / np.exp(cosine).sum(1, keepdims=True)
        expected = attention @ np.eye(WAYS)[y.astype(int)]
        task = matching(identity_task(), WAYS, support=6, temperature=temperature)
        np.testing.assert_allclose(np.exp(predicted(task, an_episode())), expected, rtol=1e-4, atol=1e-7)


def test_ridge_is_the_regression_that_it_says():
    """By the normal equations over features, which Woodbury's identity avoids; an S x S system against an F x F one."""
    x, y, q = parts(an_episode())
    r, a, b = 0.3, 2.0, -0.5
    w = np.linalg.solve(x.T @ x + r * np.eye(5), x.T @ np.eye(WAYS)[y.astype(int)])
    task = ridge_head(identity_task(), WAYS, support=6, regularization=r, scale=a)
    variables = task.init(KEY)
    variables["params"]["ridge"]["bias"] = jnp.float32(b)
    np.testing.assert_allclose(predicted(task, an_episode(), variables), a * q @ w + b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_a_masked_example_of_the_support_counts_nothing(name):
    task, episode = HEADS[name](identity_task(), WAYS, support=6), an_episode()
    support = episode["support"]
    mask = support["mask"].at[1].set(0)
    other = support["inputs"].at[1].set(100.0)
    one, two = ({**episode, "support": {**support, "mask": mask, "inputs": x}} for x in (support["inputs"], other))
    np.testing.assert_allclose(predicted(task, one), predicted(task, two), rtol=1e-5)
    gone = {**episode, "support": {name: jnp.delete(x, 1, axis=0) for name, x in support.items()}}
    np.testing.assert_allclose(predicted(task, one), predicted(task, gone), rtol=1e-4, atol=1e-5)
    assert np.abs(predicted(task, one) - predicted(task, episode)).max() > 1e-3


@pytest.mark.parametrize("name", HEADS)
def test_an_example_of_mask_two_counts_as_if_it_were_there_twice(name):
    once = an_episode()
    heavy = {**once["support"], "mask": once["support"]["mask"].at[1].set(2.0)}
    twice = {k: jnp.concatenate([x, x[1:2]]) for k, x in once["support"].items()}
    found = predicted(HEADS[name](identity_task(), WAYS, support=6), {**once, "support": heavy})
    expected = predicted(HEADS[name](identity_task(), WAYS, support=7), {**once, "support": twice})
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_a_class_that_is_not_shown_is_never_the_answer_and_gradients_stay_finite(name):
    task, episode = HEADS[name](identity_task(), WAYS + 1, support=6), an_episode()
    found = predicted(task, episode)
    assert (found[:, WAYS] == -1e9).all() and (found[:, :WAYS] > -1e6).all()
    zero = {**episode, "support": {**episode["support"], "inputs": jnp.zeros_like(episode["support"]["inputs"])}}
    variables = task.init(KEY)
    grads = jax.jit(jax.grad(lambda p: task.loss({**variables, "params": p}, zero, KEY)[0]))(variables["params"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", HEADS)
def test_the_loss_is_the_masked_cross_entropy_of_the_query(name):
    task, episode = HEADS[name](identity_task(), WAYS, support=6), an_episode()
    mask = jnp.array([1.0, 0, 1, 1])
    episode = {**episode, "query": {**episode["query"], "mask": mask}}
    value, aux = jax.jit(task.loss)(task.init(KEY), episode, KEY)
    log_p = np.asarray(jax.nn.log_softmax(predicted(task, episode)))
    nll = -log_p[np.arange(QUERIES), np.asarray(episode["query"]["targets"])]
    assert float(value) == pytest.approx(float((nll * mask).sum() / 3), rel=1e-5) and float(aux.weight) == 3
    correct = (log_p.argmax(1) == np.asarray(episode["query"]["targets"])) * np.asarray(mask)
    assert float(aux.metrics["accuracy"][0]) == correct.sum()


@pytest.mark.parametrize("name", [n if n == "prototypical" else pytest.param(n, marks=pytest.mark.slow) for n in HEADS])
def test_over_tasks_it_learns_features_that_tell_classes_apart(name):
    """Inputs have two features that tell classes apart and six large ones that do not."""
    base = small_classifier(batch=QUERIES, features=8, classes=4)
    base = base._replace(
        init=lambda key: {**small_classifier(features=8, classes=4).init(key), "frozen": {"scale": jnp.ones(8)}}
    )
    task = over_tasks(HEADS[name](base, WAYS, support=6), 8)
    learner = gradient(task, optax.adam(0.03))
    contracts.check_learner(learner)

    def batch(i):
        draw = np.random.default_rng(i)
        centres = np.concatenate([draw.normal(size=(8, WAYS, 2)), np.zeros((8, WAYS, 6))], -1)

        def part(y):
            x = np.take_along_axis(centres, y[..., None], 1) + draw.normal(size=(*y.shape, 8)) * ([0.1] * 2 + [1.0] * 6)
            return {"inputs": jnp.float32(x), "targets": jnp.int32(y), "mask": jnp.ones(y.shape)}

        return {"support": part(np.tile(np.repeat(np.arange(WAYS), 2), (8, 1))), "query": part(draw.integers(0, WAYS, (8, 4)))}

    state, step, seen = jax.jit(learner.init)(KEY), jax.jit(learner.step), []
    for i in range(300):
        state, metrics = step(state, batch(i), KEY)
        seen.append(float(metrics["accuracy"][0] / metrics["accuracy"][1]))
    assert np.mean(seen[-50:]) > np.mean(seen[:20]) + 0.15, (np.mean(seen[:20]), np.mean(seen[-50:]))


def test_what_the_method_does_not_reach_stays_as_it_is():
    trunk = small_classifier(batch=QUERIES)
    hidden = Method(
        lambda v, inputs, key: jnp.tanh(inputs["inputs"] @ v["params"]["trunk"]["kernel"]), trunk.methods["predict"].inputs
    )
    task = prototypical(trunk._replace(methods={**trunk.methods, "embed": hidden}), 2, method="embed", support=4)
    learner = gradient(task, optax.sgd(0.1))
    state = learner.init(KEY)
    draw = jax.random.normal(KEY, (4, 3))
    episode = {name: {"inputs": draw + i, "targets": jnp.int32([0, 1, 0, 1]), "mask": jnp.ones(4)}
               for i, name in enumerate(("support", "query"))}  # fmt: skip
    new, _ = jax.jit(learner.step)(state, episode, KEY)
    np.testing.assert_array_equal(new["params"]["head"]["kernel"], state["params"]["head"]["kernel"])
    assert not np.array_equal(new["params"]["trunk"]["kernel"], state["params"]["trunk"]["kernel"])


def pairs_of_arrays():
    base = small_classifier()
    two = Method(lambda v, i, k: (i["inputs"], i["inputs"]), base.methods["predict"].inputs)
    return base._replace(methods={"predict": two})


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: prototypical(small_classifier(), 1), "prototypical: ways=1; allowed: 2 or more"),
        (lambda: matching(small_classifier(), 3, support=0), "matching: support=0; allowed: 1 or more, or None"),
        (lambda: matching(small_classifier(), 3, temperature=0), "matching: temperature=0; allowed: above 0"),
        (lambda: ridge_head(small_classifier(), 3, regularization=0), "ridge_head: regularization=0; allowed: above 0, finite"),
        (
            lambda: ridge_head(small_classifier(), 3, method="predic"),
            "ridge_head: method='predic' is unknown; allowed: predict; nearest: 'predict'",
        ),
        (
            lambda: prototypical(prototypical(small_classifier(), 3), 3),
            "prototypical: method='predict' takes support, query; allowed: one that takes \"inputs\" alone",
        ),
        (lambda: prototypical(pairs_of_arrays(), 3), "prototypical: method='predict' gives (ShapeDtypeStruct("),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make, said):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value).startswith(said) and "\n" not in str(error.value)
