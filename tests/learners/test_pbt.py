"""Members that do badly become copies of ones that do well, with hyperparameters of their own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.base import base
from research.core import contracts
from research.core.batches import from_function
from research.core.hooks import Hook
from research.core.loop import fit
from research.core.mesh import make_layout
from research.experiment import build
from research.learners import average, gradient, loss_as_score, pbt, population, skip_nonfinite
from tests.learners.toys import KEY, TASK, a_batch, close, same, started

TX = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
RATES = (0.001, 0.01, 0.1, 0.2, 0.05)
BOUNDS = {"learning_rate": (1e-4, 1.0)}
MANY = population(gradient(TASK, TX), 5, {"learning_rate": RATES})


def a_pair(i=0):
    return {"train": a_batch(i), "validation": a_batch(50 + i)}


def ranked(learner, scores):
    """A first State whose members score as given, by `by_bias`, after a step that learns nothing from a rate of 0."""
    state = started(learner)
    linear = {**state["params"]["linear"], "bias": jnp.asarray(scores, jnp.float32)}
    rates = jnp.zeros_like(rate_of(state))
    opt = state["opt"]._replace(hyperparams={"learning_rate": rates})
    return {**state, "params": {"linear": linear}, "opt": opt}


def by_bias(variables, batch, key):
    return variables["params"]["linear"]["bias"]


def rate_of(state):
    return state["opt"].hyperparams["learning_rate"]


def value(metrics, name):
    return np.asarray(metrics[f"pbt/{name}"][0])


def stepped(learner, state, batch=None, key=KEY):
    return jax.jit(learner.step)(state, a_pair() if batch is None else batch, key)


def test_the_last_become_copies_of_the_first_and_the_others_stay():
    learner = pbt(MANY, by_bias, BOUNDS, 1, fraction=0.4)
    contracts.check_learner(learner)
    before, step, plain = ranked(learner, (3.0, 1.0, 5.0, 2.0, 4.0)), jax.jit(learner.step), jax.jit(MANY.step)
    for i in range(4):
        state, metrics = step(before, a_pair(), jax.random.key(i))
        source = value(metrics, "source").astype(int)
        assert value(metrics, "rank").tolist() == [2, 0, 4, 1, 3]
        assert value(metrics, "replaced").tolist() == [0, 0, 1, 0, 1]
        assert source[[0, 1, 3]].tolist() == [0, 1, 3] and set(source[[2, 4]]) <= {1, 3}
        same(state["params"], jax.tree.map(lambda x, s=source: x[s], before["params"]))
        moments = {k: v for k, v in state.items() if k in ("state", "memory")}
        after = plain(before, a_batch(), jax.random.split(jax.random.key(i))[0])[0]
        close(moments, jax.tree.map(lambda x, s=source: x[s], {k: after[k] for k in moments}))
        same(state["frozen"], before["frozen"])


def test_hyperparameters_come_with_the_copy_and_are_then_perturbed_within_bounds():
    bounds = {"learning_rate": (1e-4, 0.11)}
    learner = pbt(MANY, loss_as_score(TASK), bounds, 1, fraction=0.4, factors=(0.5, 2.0))
    seen, before, step = set(), started(learner), jax.jit(learner.step)
    for i in range(6):
        state, metrics = step(before, a_pair(), jax.random.key(i))
        source, replaced = value(metrics, "source").astype(int), value(metrics, "replaced") > 0
        start, rates = np.float32(RATES), np.asarray(rate_of(state))
        assert replaced.sum() == 2
        np.testing.assert_array_equal(rates[~replaced], start[~replaced])  # theirs may be out of bounds: it was given so
        allowed = [np.clip(start[source] * np.float32(f), 1e-4, np.float32(0.11)) for f in (0.5, 2.0)]
        assert ((rates == allowed[0]) | (rates == allowed[1]))[replaced].all()
        seen |= {bool(x) for x in (rates == allowed[0])[replaced]}
        np.testing.assert_array_equal(metrics["hyper/learning_rate"][0], rates)
    assert seen == {True, False}


def test_resampled_hyperparameters_are_log_uniform_between_the_bounds():
    many = population(gradient(TASK, TX), 400)
    learner = pbt(many, loss_as_score(TASK), {"learning_rate": (1e-3, 1e-1)}, 1, fraction=0.5, resample=1.0)
    state, metrics = stepped(learner, started(learner))
    drawn = np.log10(np.asarray(rate_of(state))[value(metrics, "replaced") > 0])
    assert len(drawn) == 200 and drawn.min() >= -3 and drawn.max() <= -1
    # the mean of 200 draws from [-3, -1]: standard error 0.041; 5 of them
    assert abs(drawn.mean() + 2) < 0.2 and 0.4 < drawn.std() < 0.75


def test_it_happens_every_so_many_steps_and_otherwise_it_is_the_population():
    learner = pbt(MANY, loss_as_score(TASK), BOUNDS, 3)
    state, plain = started(learner), started(MANY)
    same(state, plain)
    weights = []
    step, plain_step = jax.jit(learner.step), jax.jit(MANY.step)
    for i in range(6):
        key = jax.random.fold_in(KEY, i)
        if i < 2:
            plain, expected = plain_step(plain, a_batch(i), jax.random.split(key)[0])
        state, metrics = step(state, a_pair(i), key)
        if i < 2:
            close(state, plain)
            close({k: metrics[k] for k in expected}, dict(expected))
        weights.append(float(metrics["pbt/rank"][1][0]))
    assert weights == [0, 0, 1, 0, 0, 1]


def test_one_members_nan_stops_that_member_alone_until_it_is_replaced():
    rates = (0.01, 0.02, 3e38, 0.03)
    many = population(skip_nonfinite(gradient(TASK, TX)), 4, {"learning_rate": rates})
    learner = pbt(many, loss_as_score(TASK), BOUNDS, 3, fraction=0.25)
    state, step = started(learner), jax.jit(learner.step)
    skipped, replaced = [], []
    for i in range(6):
        state, metrics = step(state, a_pair(i), jax.random.fold_in(KEY, i))
        skipped.append(np.asarray(metrics["skipped"][0]).tolist())
        replaced.append(value(metrics, "replaced").tolist())
    assert skipped[:3] == [[0, 0, 1, 0]] * 3 and skipped[3:] == [[0, 0, 0, 0]] * 3
    assert replaced[2][2] == 1 and np.asarray(rate_of(state)).max() < 0.1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_scores_that_are_not_finite_are_replaced_whatever_their_number_and_nobody_moves_if_all_are():
    learner = pbt(MANY, by_bias, BOUNDS, 1, fraction=0.2)
    before = ranked(learner, (np.nan, 1.0, np.inf, np.nan, 2.0))
    _, metrics = stepped(learner, before)
    assert value(metrics, "replaced").tolist() == [1, 0, 1, 1, 0]
    assert value(metrics, "source").tolist() == [1, 1, 1, 1, 4]
    assert np.asarray(metrics["pbt/score"][1]).tolist() == [0, 1, 0, 0, 1]
    state, metrics = stepped(learner, ranked(learner, [np.nan] * 5))
    assert value(metrics, "replaced").tolist() == [0] * 5 and value(metrics, "source").tolist() == [0, 1, 2, 3, 4]
    assert np.isnan(state["params"]["linear"]["bias"]).all()


def test_a_rate_that_is_found_beats_the_ones_it_began_with():
    """All members begin far too slow; pbt finds its way up, the same population alone does not."""
    rates = tuple(np.geomspace(1e-4, 1e-3, 8))
    many = population(gradient(TASK, TX), 8, {"learning_rate": rates})
    learner = pbt(many, loss_as_score(TASK), {"learning_rate": (1e-5, 0.3)}, 2, fraction=0.25, factors=(0.5, 2.0))
    pairs = from_function(lambda i: jax.tree.map(np.asarray, a_pair(i % 7)))
    plain = from_function(lambda i: jax.tree.map(np.asarray, a_batch(i % 7)))
    found = fit(learner, pairs, 80, key=KEY, steps_per_call=20)
    alone = fit(many, plain, 80, key=KEY, steps_per_call=20)

    def best(state):
        losses = [TASK.loss({**{k: jax.tree.map(lambda x, m=m: x[m], state[k]) for k in ("params", "state")},
                             "frozen": state["frozen"]}, a_batch(99), KEY)[0] for m in range(8)]  # fmt: skip
        return float(min(losses))

    assert float(rate_of(found).max()) > 1e-2 and best(found) < 0.1 * best(alone)


def test_an_average_is_scored_and_copied():
    many = population(average(gradient(TASK, TX), 0.5), 4, {"learning_rate": RATES[:4]})
    learner = pbt(many, loss_as_score(TASK), BOUNDS, 1, fraction=0.25)
    contracts.check_learner(learner)
    state, metrics = stepped(learner, started(learner))
    source = value(metrics, "source").astype(int)
    bad = int(np.argmax(value(metrics, "replaced")))
    same(*({"average": jax.tree.map(lambda x, m=m: x[m], state["average"])} for m in (bad, source[bad])))


@pytest.mark.slow
def test_over_a_mesh_it_is_what_it_is_on_one_device():
    many = population(skip_nonfinite(gradient(TASK, TX)), 8, {"learning_rate": tuple(np.geomspace(0.001, 0.3, 8))})
    learner = pbt(many, loss_as_score(TASK), BOUNDS, 2, fraction=0.25, resample=0.25)
    pairs = from_function(lambda i: jax.tree.map(np.asarray, a_pair(i)))
    layouts, seen = (None, make_layout({"population": 4, "data": 2})), []

    class Losses(Hook):
        def log(self, step, metrics):
            seen.append(metrics["loss"])

    one, laid = (fit(learner, pairs, 4, key=KEY, log_every=2, hooks=[Losses()], mesh=layout) for layout in layouts)
    close(jax.device_get(laid), jax.device_get(one))
    np.testing.assert_allclose(seen[2:], seen[:2], rtol=1e-5)
    assert {s.data.shape for s in laid["params"]["linear"]["kernel"].addressable_shards} == {(2, 3)}


def config(**learner):
    config = base()
    config.update(
        {"task": {"name": "classification", "label_smoothing": 0.0}, "optimizer": {"name": "sgd", "learning_rate": 0.1}}
    )
    config.data = {"name": "mnist1d", "shuffled": False, "seed": 42}
    config.model = {"name": "mnist1d", "kind": "linear"}
    config.stream = {"batch": 50, "validation": 500, "bad_records": "raise"}
    config.learner = {"wrap": ["population", "pbt"], "watch": {}, "population": {"n": 3, "method": "vmap"}, **learner}
    config.evaluate = {"every": 0, "batch": 500}
    config.train.steps = 10
    return config


PBT = {"every": 5, "hyper": {"learning_rate": [1e-3, 1.0]}}


def test_a_config_selects_it():
    """Training batches are paired with held-out ones, and the score is their negative log likelihood."""
    vary = {"n": 3, "method": "vmap", "vary": {"learning_rate": [1e-3, 1e-2, 0.1]}}
    experiment = build(config(population=vary, pbt=PBT))
    stage = experiment.stages[0]
    contracts.check_learner(stage.learner)
    batch = next(stage.batches.open())
    contracts.check_batch(batch, stage.learner.batch, "batch")
    state, metrics = jax.jit(stage.learner.init)(KEY), {}
    step = jax.jit(stage.learner.step)
    for i in range(5):
        state, metrics = step(state, batch, jax.random.fold_in(KEY, i))
    scores = np.asarray(metrics["pbt/score"][0])
    variables = stage.learner.variables(state)
    logits = stage.learner.methods["predict"].apply(variables, {"inputs": batch["validation"]["inputs"]}, KEY)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, batch["validation"]["targets"][None]).mean(1)
    kept = value(metrics, "replaced") == 0
    np.testing.assert_allclose(scores[kept], expected[kept], rtol=1e-5)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: config(pbt={**PBT, "evry": 5}), "learner.pbt.evry is unknown; allowed in learner.pbt: every, hyper, fraction"),
        (lambda: config(pbt={"every": 5}), "learner.pbt lacks learner.pbt.hyper; given: every"),
        (lambda: config(pbt={**PBT, "hyper": {"rate": [0.1, 1.0]}}), "hyper['rate']: no leaf of the State is called so"),
        (lambda: config(pbt=PBT, wrap=["pbt", "population"]), "pbt: needs a population, got a learner whose State"),
        (lambda: small(config(pbt=PBT)), "learner.pbt scores members on held-out examples, and there are none; allowed: "),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_one_line(make, said):
    with pytest.raises(ValueError) as error:
        build(make())
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def small(config):
    config.stream.validation = 20
    return config


def test_the_exploit_is_one_branch_not_taken_in_other_steps():
    """The population's own step is in the program once, and scoring only under the condition."""
    learner = pbt(MANY, loss_as_score(TASK), BOUNDS, 4)
    jaxpr = jax.make_jaxpr(learner.step)(started(learner), a_pair(), KEY).jaxpr
    assert [e.primitive.name for e in jaxpr.eqns].count("cond") == 1
    over = population(learner, 2)  # a population of them too: the count of steps is shared
    inner = jax.make_jaxpr(over.step)(started(over), a_pair(), KEY).jaxpr
    assert [e.primitive.name for e in inner.eqns].count("cond") == 1


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: pbt(gradient(TASK, TX), by_bias, BOUNDS, 1), "pbt: needs a population, got a learner whose State has no axis"),
        (lambda: pbt(population(gradient(TASK, TX), 1), by_bias, BOUNDS, 1), "pbt: a population of 1; allowed: 2 members or"),
        (lambda: pbt(MANY, by_bias, BOUNDS, 0), "pbt: every=0; allowed: 1 or more"),
        (lambda: pbt(MANY, by_bias, BOUNDS, 1, fraction=0.6), "pbt: fraction=0.6; allowed: above 0, at most 0.5"),
        (lambda: pbt(MANY, by_bias, BOUNDS, 1, factors=(0.8, 0)), "pbt: factors=(0.8, 0); allowed: one number or more"),
        (lambda: pbt(MANY, by_bias, BOUNDS, 1, resample=1.5), "pbt: resample=1.5; allowed: from 0 to 1"),
        (lambda: pbt(MANY, by_bias, {}, 1), "pbt: hyper={}; allowed: {name: (lowest, highest)}, such as"),
        (
            lambda: pbt(MANY, by_bias, {"learning_rat": (0, 1)}, 1),
            "hyper['learning_rat']: no leaf of the State is called so; nearest: 'learning_rate'",
        ),
        (lambda: pbt(MANY, by_bias, {"scale": (0, 1)}, 1), "hyper['scale']: frozen/scale is shared by all members"),
        (lambda: pbt(MANY, by_bias, {"seen": (0, 1)}, 1), "hyper['seen']: state/seen is int32; allowed: a float"),
        (lambda: pbt(MANY, by_bias, {"learning_rate": (1, 1)}, 1), "hyper['learning_rate']=(1, 1); allowed: (lowest, highest)"),
        (
            lambda: pbt(MANY, by_bias, {"learning_rate": (0, 1)}, 1, resample=0.1),
            "hyper['learning_rate']=(0, 1): resample=0.1 draws between them; allowed: above 0, finite",
        ),
        (
            lambda: pbt(MANY, lambda v, b, k: v["params"]["linear"]["kernel"], BOUNDS, 1),
            "pbt: score gives ShapeDtypeStruct(shape=(5, 3), dtype=float32) over the members; allowed: one number a member",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make, said):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value).startswith(said) and "\n" not in str(error.value)
