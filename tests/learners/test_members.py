"""What is written for one member is the same over a population."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core import contracts
from research.core.types import Evaluator
from research.learners import gradient, members, population
from tests.learners.toys import KEY, TASK, a_batch, close, same, started

LEARNER = gradient(TASK, optax.sgd(0.1))


def update(stats, variables, batch, key):
    errors = TASK.methods["predict"].apply(variables, batch, key) - batch["targets"] + 0.1 * jax.random.normal(key, (8,))
    return {"sum": stats["sum"] + (errors**2 * batch["mask"]).sum(), "weight": stats["weight"] + batch["mask"].sum()}


ONE = Evaluator(
    lambda: {"sum": 0.0, "weight": 0.0},
    update,
    lambda s: {"mse": float(s["sum"] / s["weight"]), "parts": np.array([s["sum"], s["weight"]])},
)


def of_member(variables, i):
    return {**jax.tree.map(lambda x: x[i], {k: variables[k] for k in ("params", "state")}), "frozen": variables["frozen"]}


def measured(evaluator, variables):
    stats = jax.tree.map(jnp.asarray, evaluator.init())
    for i in range(3):
        stats = jax.jit(evaluator.update)(stats, variables, a_batch(i), jax.random.fold_in(KEY, i))
    return evaluator.finalize(jax.device_get(stats))


def test_an_evaluator_over_members_gives_an_array_of_what_each_would_give():
    many = population(LEARNER, 3)
    variables, lifted = many.variables(started(many)), members(ONE, 3)
    contracts.check_evaluator(lifted, variables, a_batch())
    found = measured(lifted, variables)
    each = [measured(ONE, of_member(variables, i)) for i in range(3)]
    assert found["mse"].shape == (3,) and found["parts"].shape == (3, 2)
    close(found["mse"], np.array([e["mse"] for e in each]))
    close(found["parts"], np.stack([e["parts"] for e in each]))


def test_an_evaluator_over_members_with_a_frozen_of_their_own():
    many = population(LEARNER, 2, frozen="own")
    variables = many.variables(started(many))
    variables = {**variables, "frozen": {"scale": jnp.array([[1.0, 1, 1], [2, 2, 2]])}}
    found = measured(members(ONE, 2, frozen="own"), variables)
    assert found["mse"][1] == pytest.approx(measured(ONE, jax.tree.map(lambda x: x[1], variables))["mse"], rel=1e-5)


def grown(variables, key):
    """Noise on the params, and the old ones kept as an anchor."""
    noise = jax.tree.map(lambda p: p + jax.random.normal(key, p.shape), variables["params"])
    return {"params": noise, "state": variables["state"], "frozen": {**variables["frozen"], "anchor": variables["params"]}}


def test_an_enter_over_members_has_a_key_for_each_and_may_leave_each_a_frozen():
    many = population(LEARNER, 2)
    variables = many.variables(started(many))
    out = members(grown, 2, leaves="own")(variables, KEY)
    for i in range(2):
        close(jax.tree.map(lambda x, i=i: x[i], out), grown(of_member(variables, i), jax.random.fold_in(KEY, i)))
    assert out["frozen"]["scale"].shape == (2, 3)


def test_an_enter_that_leaves_frozen_as_it_is_keeps_it_shared():
    many = population(LEARNER, 2)
    variables = many.variables(started(many))
    out = members(lambda v, key: {**v, "params": jax.tree.map(lambda p: p * 2, v["params"])}, 2)(variables, KEY)
    same(out["frozen"], variables["frozen"])
    same(many.variables(many.init(KEY, out)), out)


def test_an_enter_without_a_stage_before_begins_each_member():
    out = members(lambda variables, key: TASK.init(key), 3)(None, KEY)
    close(jax.tree.map(lambda x: x[2], out["params"]), TASK.init(jax.random.fold_in(KEY, 2))["params"])


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="population: frozen='owned' is unknown; allowed: own, shared; nearest: 'own'"):
        members(ONE, 2, frozen="owned")
