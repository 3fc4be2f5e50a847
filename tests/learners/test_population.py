"""A population is its members, run together."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core import contracts
from research.core.mesh import entered, make_layout
from research.core.types import Aux
from research.estimates import accumulated, sharpness_aware
from research.learners import average, gradient, population
from tests.learners.toys import KEY, TASK, a_batch, close, same, started, stepped, trained

TX = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
LEARNER = gradient(TASK, TX, sharpness_aware(0.05, accumulated(2)))
RATES = (0.01, 0.1, 0.2)


def noisy(task=TASK):
    """The task with noise on its inputs, so that a member's key matters."""

    def loss(variables, batch, key):
        noise = 0.1 * jax.random.normal(key, batch["inputs"].shape)
        return task.loss(variables, {**batch, "inputs": batch["inputs"] + noise}, key)

    return task._replace(loss=loss)


def alone(learner, i, steps, rate=None):
    """Member i trained by itself, with the keys that a population gives it."""
    state = learner.init(jax.random.fold_in(KEY, i))
    if rate is not None:
        state = {**state, "opt": state["opt"]._replace(hyperparams={"learning_rate": jnp.float32(rate)})}
    step = jax.jit(learner.step)
    for j in range(steps):
        state, metrics = step(state, a_batch(j), jax.random.fold_in(jax.random.fold_in(KEY, j), i))
    return state, metrics


def member(state, i):
    return {k: v if k in ("step", "frozen") else jax.tree.map(lambda x: x[i], v) for k, v in state.items()}


@pytest.mark.parametrize("method", ["vmap", "map"])
def test_members_are_what_they_would_be_alone(method):
    learner = gradient(noisy(), TX, sharpness_aware(0.05, accumulated(2)))
    many = population(learner, 3, {"learning_rate": RATES}, method=method)
    contracts.check_learner(many)
    state, seen = trained(many, 3)
    for i, rate in enumerate(RATES):
        one, metrics = alone(learner, i, 3, rate)
        close({**member(state, i), "frozen": 0}, {**one, "frozen": 0})
        close({k: (v[0][i], v[1][i]) for k, v in seen[-1].items()}, metrics)
    assert state["step"].shape == () and state["frozen"]["scale"].shape == (3,)


def test_vmap_and_map_give_the_same():
    learner = gradient(noisy(), TX)
    close(*(trained(population(learner, 3, method=m), 3) for m in ("vmap", "map")))


def test_a_member_does_not_depend_on_how_many_there_are():
    small, large = (started(population(LEARNER, n)) for n in (2, 5))
    same(member(small, 1), member(large, 1))
    assert not np.array_equal(large["params"]["linear"]["kernel"][0], large["params"]["linear"]["kernel"][1])


def test_methods_take_stacked_variables_and_one_set_of_inputs():
    many = population(LEARNER, 3)
    variables = many.variables(started(many))
    out = many.methods["predict"].apply(variables, a_batch(), KEY)
    assert out.shape == (3, 8)
    close(
        out[1],
        TASK.methods["predict"].apply(
            {**jax.tree.map(lambda x: x[1], {k: variables[k] for k in ("params", "state")}), "frozen": variables["frozen"]},
            a_batch(),
            KEY,
        ),
    )


def test_variables_are_given_stacked_and_a_shared_frozen_is_not():
    many = population(LEARNER, 2)
    given = jax.tree.map(lambda x: x + 1, many.variables(started(many)))
    same(many.variables(many.init(jax.random.key(5), given)), given)
    stacked = {**given, "frozen": jax.tree.map(lambda x: jnp.stack([x, x]), given["frozen"])}
    with pytest.raises(ValueError) as error:
        many.init(KEY, stacked)
    assert str(error.value) == "population: variables: frozen/scale: expected float32[3], got float32[2,3]"
    single = LEARNER.variables(started(LEARNER))
    with pytest.raises(ValueError, match=r"population: variables: params/linear/bias: expected float32\[2\], got float32\[\]"):
        many.init(KEY, single)


def test_members_may_have_a_frozen_of_their_own():
    many = population(LEARNER, 2, frozen="own")
    contracts.check_learner(many)
    assert many.axes["frozen"] == {"scale": jax.P("population", "embed")}
    given = many.variables(started(many))
    given = {**given, "frozen": {"scale": jnp.array([[1.0, 1, 1], [2, 2, 2]])}}
    state = many.init(KEY, given)
    new, _ = stepped(many, state, a_batch())
    same(new["frozen"], given["frozen"])
    own = {**started(LEARNER), **jax.tree.map(lambda x: x[1], given)}
    close(new["params"]["linear"]["kernel"][1], stepped(LEARNER, own, a_batch())[0]["params"]["linear"]["kernel"])


def test_axes_start_with_population_but_for_what_is_shared():
    axes = population(LEARNER, 2).axes
    assert axes["params"] == {"linear": {"kernel": jax.P("population", "embed"), "bias": jax.P("population")}}
    assert axes["step"] == jax.P() and axes["frozen"] == {"scale": jax.P("embed")}
    assert all(a[0] == "population" for a in jax.tree.leaves(axes["opt"]))


def test_populations_nest():
    nested = population(population(LEARNER, 2), 3)
    contracts.check_learner(nested)
    state, seen = trained(nested, 2)
    assert (
        state["params"]["linear"]["kernel"].shape == (3, 2, 3)
        and state["step"].shape == ()
        and seen[0]["loss"][0].shape == (3, 2)
    )
    assert nested.methods["predict"].apply(nested.variables(state), a_batch(), KEY).shape == (3, 2, 8)


def test_an_average_within_gives_averaged_variables():
    many = population(average(LEARNER, 0.5), 2)
    state, _ = trained(many, 2)
    one, _ = alone(average(LEARNER, 0.5), 1, 2)
    close(jax.tree.map(lambda x: x[1], many.variables(state)["params"]), average(LEARNER, 0.5).variables(one)["params"])


def two_rates():
    rate = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    return gradient(TASK, optax.multi_transform({"a": rate, "b": rate}, {"linear": {"kernel": "a", "bias": "b"}}))


def test_a_hyperparameter_may_be_named_by_keys_before_it():
    state = population(two_rates(), 2, {"a/learning_rate": (0.3, 0.4)}).init(KEY)
    inner = state["opt"].inner_states
    assert inner["a"].inner_state.hyperparams["learning_rate"].tolist() == pytest.approx([0.3, 0.4])
    assert inner["b"].inner_state.hyperparams["learning_rate"].tolist() == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize(
    "make, said",
    [
        (
            lambda: population(LEARNER, 2, {"learning_rat": (1, 2)}),
            "vary['learning_rat']: no leaf of the State is called so; nearest: 'learning_rate'",
        ),
        (
            lambda: population(LEARNER, 2, {"learning_rate": (1, 2, 3)}),
            "vary['learning_rate']: expected (2,) values, one a member, got (3,)",
        ),
        (
            lambda: population(LEARNER, 2, {"scale": (1, 2)}),
            "vary['scale']: frozen/scale is shared by all members and cannot vary",
        ),
        (lambda: population(LEARNER, 2, {"step": (1, 2)}), "vary['step']: step is shared by all members and cannot vary"),
        (
            lambda: population(two_rates(), 2, {"learning_rate": (1, 2)}),
            "vary['learning_rate']: 2 leaves are called so, opt/inner_states/a/",
        ),
        (lambda: population(LEARNER, 0), "population: n=0; allowed: 1 or more"),
        (
            lambda: population(LEARNER, 2, method="vmapp"),
            "population: method='vmapp' is unknown; allowed: map, vmap; nearest: 'vmap'",
        ),
        (lambda: population(LEARNER, 2, frozen="each"), "population: frozen='each' is unknown; allowed: own, shared"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make, said):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def summed_by_hand():
    """The task with its sum of squares taken by shard_map over the mesh axis "data", where there is one."""

    def errors(kernel, inputs, targets):
        return jax.lax.psum(((inputs @ kernel - targets) ** 2).sum(), "data")

    def loss(variables, batch, key):
        kernel, rows = variables["params"]["linear"]["kernel"], (batch["inputs"], batch["targets"])
        specs = (jax.P(), jax.P("data"), jax.P("data"))
        total = jax.shard_map(errors, in_specs=specs, out_specs=jax.P())(kernel, *rows)
        weight = jnp.full((), 8.0)
        return total / weight, Aux(variables["state"], {}, weight)

    return TASK._replace(loss=loss)


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs 4 simulated devices (jax_num_cpu_devices)")
def test_laid_over_a_mesh_axis_each_device_computes_its_own_members_alone():
    """Inside a shard_map jax cannot know by itself that the vmapped axis is laid over the mesh: the layout in use says so."""
    flops, results = {}, {}
    plain = population(gradient(TASK, optax.sgd(0.1)), 2)
    start = started(plain)
    for over in ((), ("population",)):
        layout = make_layout({"population": 2, "data": 2}, {"population": over, "batch": ("data",)})
        laid = make_layout({"population": 2, "data": 2}, {"population": ("population",), "batch": ("data",)})
        # scale and bias, which the sum by hand leaves out, are 1 and 0 here
        whole = {**start, "frozen": {"scale": jnp.ones(3)}}
        with entered(layout):
            many = population(gradient(summed_by_hand(), optax.sgd(0.1)), 2)
            states = laid.shardings(many.axes, whole, "state")
            state, batch = jax.device_put(whole, states), jax.device_put(a_batch(), layout.batch_shardings(many.batch))
            step = jax.jit(many.step, out_shardings=(states, None)).lower(state, batch, KEY).compile()
            flops[over], results[over] = step.cost_analysis()["flops"], step(state, batch, KEY)[0]
    expected = stepped(plain, {**start, "frozen": {"scale": jnp.ones(3)}}, a_batch())[0]
    for result in results.values():
        close(result["params"]["linear"]["kernel"], expected["params"]["linear"]["kernel"])
    assert flops[("population",)] < 0.8 * flops[()]
