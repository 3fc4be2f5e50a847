"""The suite can fail: members with one planted fault each are caught by the property that it breaks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest

from research.core.types import Aux, Evaluator, Example
from research.estimates import accumulated
from research.estimates._example import linear_regression
from research.learners import gradient
from tests.contracts import properties

TASK = linear_regression()


def losing(change):
    """The task with (value, Aux) changed by change(value, aux, variables, batch, key)."""

    def loss(variables, batch, key):
        return change(*TASK.loss(variables, batch, key), variables, batch, key)

    return Example(TASK._replace(loss=loss))


def stepping(change):
    learner = gradient(TASK, optax.sgd(0.1))
    return Example(learner._replace(step=lambda s, b, k: change(*learner.step(s, b, k), s)))


def clocked():
    """A step that depends on how often Python has called it."""
    calls = []

    def change(new, metrics, old):
        def count(_):
            calls.append(1)
            return jnp.float32(len(calls)).__array__()

        tick = jax.experimental.io_callback(count, jax.ShapeDtypeStruct((), jnp.float32), 0)
        return new, {**metrics, "tick": (tick, jnp.ones(()))}

    return stepping(change)


def straight_through(params):
    return params + jax.lax.stop_gradient(jnp.round(params) - params)


def rounded_loss(value, aux, variables, batch, key):
    line = variables["params"]["linear"]
    return TASK.loss({**variables, "params": {"linear": {**line, "kernel": straight_through(line["kernel"])}}}, batch, key)


def summed(value, aux, variables, batch, key):
    return value * aux.weight, aux


def unbiased_only_by_row(value, aux, variables, batch, key):
    """A contrast between rows: no weighted mean of parts, though it says so."""
    x = batch["inputs"]
    return value + ((x - x.mean(0)[None]) ** 2).mean() * variables["params"]["linear"]["bias"] ** 2 + x.std(), aux


def shrunk_gradient():
    estimate = accumulated(4)

    def grads(*args):
        value, aux, gradients, memory = estimate.grads(*args)
        return value, aux, jax.tree.map(lambda g: 0.999 * g, gradients), memory

    return Example(estimate._replace(grads=grads), TASK)


def counting_evaluator(update):
    zeros = {"sum": jnp.zeros(()), "weight": jnp.zeros(())}
    return Example(Evaluator(lambda: zeros, update, lambda s: {"mean": float(s["sum"] / s["weight"])}), TASK)


def nameless_at_first():
    example = counting_evaluator(adding)
    finalize = example.member.finalize
    return example._replace(member=example.member._replace(finalize=lambda s: finalize(s) if s["weight"] else {}))


def unmasked(stats, variables, batch, key):
    return {"sum": stats["sum"] + batch["targets"].sum(), "weight": stats["weight"] + batch["mask"].sum()}


def adding(stats, variables, batch, key):
    return {
        "sum": stats["sum"] + (batch["targets"] * batch["mask"]).sum(),
        "weight": stats["weight"] + batch["mask"].sum(),
    }


def decaying(stats, variables, batch, key):
    return {
        "sum": 0.9 * stats["sum"] + (batch["targets"] * batch["mask"]).sum(),
        "weight": stats["weight"] + batch["mask"].sum(),
    }


FAULTS = {
    "NaN metric": (
        properties.finite_and_deterministic,
        lambda: losing(lambda v, a, *_: (v, a._replace(metrics={"x": (jnp.log(-v), v)}))),
    ),
    "infinite state": (
        properties.finite_and_deterministic,
        lambda: losing(lambda v, a, *_: (v, a._replace(state={**a.state, "mean": a.state["mean"] / 0}))),
    ),
    "not a function": (properties.finite_and_deterministic, clocked),
    "step by two": (properties.finite_and_deterministic, lambda: stepping(lambda n, m, s: ({**n, "step": s["step"] + 2}, m))),
    "frozen moves": (
        properties.finite_and_deterministic,
        lambda: stepping(lambda n, m, s: ({**n, "frozen": jax.tree.map(lambda x: x * 2, s["frozen"])}, m)),
    ),
    "frozen is rebuilt": (
        properties.abstract,
        lambda: stepping(lambda n, m, s: ({**n, "frozen": jax.tree.map(lambda x: x * 1, s["frozen"])}, m)),
    ),
    "loss is a sum": (properties.loss_is_the_weighted_mean_of_shards, lambda: losing(summed)),
    "loss contrasts rows": (properties.loss_is_the_weighted_mean_of_shards, lambda: losing(unbiased_only_by_row)),
    "weight is forgotten": (
        properties.loss_is_the_weighted_mean_of_shards,
        lambda: losing(lambda v, a, *_: (v, a._replace(weight=jnp.ones(())))),
    ),
    "straight-through": (properties.gradient_agrees_with_finite_differences, lambda: losing(rounded_loss)),
    "a gradient 0.1% off": (properties.gradient_agrees_with_finite_differences, shrunk_gradient),
    "evaluator without mask": (properties.masked_rows_count_nothing, lambda: counting_evaluator(unmasked)),
    "evaluator without names at first": (properties.evaluator_is_sound, nameless_at_first),
    "evaluator that forgets": (properties.evaluator_is_sound, lambda: counting_evaluator(decaying)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault):
    check, make = FAULTS[fault]
    with pytest.raises((AssertionError, ValueError)):
        check(make())


def test_a_key_that_depends_on_the_member_count_is_caught(monkeypatch):
    """A population whose members interfere is not its members one by one."""
    honest = properties.population

    def leaky(learner, n, **kwargs):
        many = honest(learner, n, **kwargs)

        def step(state, batch, key):
            new, metrics = many.step(state, batch, key)
            return {**new, "params": jax.tree.map(lambda p: 0.99 * p + 0.01 * p[::-1], new["params"])}, metrics

        return many._replace(step=step)

    monkeypatch.setattr(properties, "population", leaky)
    with pytest.raises(AssertionError, match="member 0"):
        properties.population_equals_one_by_one(Example(TASK))


def test_state_outside_the_state_breaks_resuming(tmp_path):
    """A learner that keeps something in Python goes on otherwise after a restart."""
    learner = gradient(TASK, optax.sgd(0.1))

    def step(state, batch, key):
        new, metrics = learner.step(state, batch, key)
        return {**new, "params": jax.tree.map(lambda p: p + 0 * p, new["params"])}, metrics

    properties.resumes_bit_for_bit(Example(learner._replace(step=step)), tmp_path / "sound")
    saved = {}

    def forgetful(state, batch, key):
        new, metrics = learner.step(state, batch, key)
        hidden = jax.experimental.io_callback(
            lambda: saved.setdefault("n", []).append(1) or jnp.float32(len(saved["n"])).__array__(),
            jax.ShapeDtypeStruct((), jnp.float32),
        )
        return {**new, "params": jax.tree.map(lambda p: p + 1e-3 * hidden, new["params"])}, metrics

    with pytest.raises(AssertionError, match="going on"):
        properties.resumes_bit_for_bit(Example(learner._replace(step=forgetful)), tmp_path / "broken")


def test_specs_are_drawn_as_examples_are_promised_them():
    batch = properties.drawn(TASK.batch, properties.KEY)
    assert batch["mask"].tolist() == [1.0] * 8 and not (batch["inputs"][:, 0] == batch["targets"]).all()
    spec = dataclasses.replace(TASK.batch["targets"], dtype=jnp.dtype(jnp.int32))
    assert set(properties.drawn({"targets": spec}, properties.KEY)["targets"].tolist()) <= {0, 1}


def test_a_loss_without_weight_is_not_split():
    properties.loss_is_the_weighted_mean_of_shards(losing(lambda v, a, *_: (v**2, Aux(a.state, {}, None))))


def test_a_loss_with_noise_is_a_weighted_mean_over_keys():
    def noisy(value, aux, variables, batch, key):
        noise = jax.random.normal(key, batch["inputs"].shape)
        return TASK.loss(variables, {**batch, "inputs": batch["inputs"] + 0.3 * noise}, key)

    properties.loss_is_the_weighted_mean_of_shards(losing(noisy))
