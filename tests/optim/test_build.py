"""Optimizers from plain values."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from research.core.tree import joined, leaves_with_paths
from research.learners import gradient, population
from research.optim import OPTIMIZERS, describe, make, optimizer, rates
from research.transforms._example import small_classifier

PARAMS = {
    "embed": {"table": jnp.linspace(-1, 1, 32).reshape(8, 4)},
    "blocks": {
        "0": {"qkv": {"kernel": jnp.linspace(-1, 1, 48).reshape(4, 12), "bias": jnp.ones(12)}, "norm": {"scale": jnp.ones(4)}}
    },
    "head": {"kernel": jnp.ones((4, 8))},
}
GRADS = jax.tree.map(lambda x: jnp.sin(3 * x) + 0.1, PARAMS)
MUON = {"name": "muon", "learning_rate": 0.02, "adam_learning_rate": 3e-3, "layouts": {"fused": {"match": "qkv", "parts": 3}}}


def step(tx, n=1, params=PARAMS):
    state = tx.init(params)
    for _ in range(n):
        updates, state = jax.jit(tx.update)(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_close(a, b, rtol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-7), a, b)


@pytest.mark.parametrize(
    "config, peer",
    [
        ({"name": "sgd"}, optax.sgd(0.1)),
        ({"name": "sgd", "momentum": 0.9, "nesterov": True}, optax.sgd(0.1, 0.9, True)),
        ({"name": "adamw", "b2": 0.95, "weight_decay": 0.1}, optax.adamw(0.1, b2=0.95, weight_decay=0.1)),
        ({"name": "rmsprop", "momentum": 0.5}, optax.rmsprop(0.1, momentum=0.5)),
        ({"name": "adagrad"}, optax.adagrad(0.1)),
        ({"name": "lion", "weight_decay": 0.1}, optax.lion(0.1, weight_decay=0.1)),
        ({"name": "adafactor", "smallest": 4}, optax.adafactor(0.1, min_dim_size_to_factor=4)),
        ({"name": "sgd", "clip": 0.01}, optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(0.1))),
    ],
)
def test_three_steps_equal_optax_own_chain(config, peer):
    ours, _ = step(make({"learning_rate": 0.1, **config}, steps=10), 3)
    theirs, _ = step(peer, 3)
    assert_close(ours, theirs)


def test_the_schedule_and_the_groups_reach_the_update():
    config = {
        "name": "sgd", "learning_rate": 1.0, "weight_decay": 0.5, "schedule": {"name": "linear", "warmup": 2},
        "groups": {"flat": {"match": "bias|scale", "weight_decay": 0.0}, "head": {"match": "head", "learning_rate": 0.25}},
    }  # fmt: skip
    params, state = step(make(config, steps=10))
    expected = {
        "embed/table": PARAMS["embed"]["table"] - 0.5 * (GRADS["embed"]["table"] + 0.5 * PARAMS["embed"]["table"]),
        "blocks/0/norm/scale": 1 - 0.5 * GRADS["blocks"]["0"]["norm"]["scale"],
        "head/kernel": PARAMS["head"]["kernel"] - 0.125 * (GRADS["head"]["kernel"] + 0.5),
    }
    found = {joined(path): x for path, x in leaves_with_paths(params)}
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, rtol=1e-6, err_msg=path)
    assert rates(state)["learning_rate_head"] == np.float32(0.125)


def test_muon_gives_everything_but_matrices_to_adamw():
    made = optimizer({**MUON, "weight_decay": 0.1, "adam_weight_decay": 0.0}, steps=10)
    adam = {"learning_rate": 3e-3, "weight_decay": 0.0}
    assert describe(made, PARAMS) == {
        "embed/table": adam, "head/kernel": adam, "blocks/0/norm/scale": adam, "blocks/0/qkv/bias": adam,
        "blocks/0/qkv/kernel": {"learning_rate": 0.02, "weight_decay": 0.1},
    }  # fmt: skip
    params, _ = step(made.transformation, 3)
    by_adam, _ = step(optax.adamw(3e-3, b2=0.95, weight_decay=0.0), 3)
    for path in (("embed", "table"), ("head", "kernel")):
        np.testing.assert_allclose(params[path[0]][path[1]], by_adam[path[0]][path[1]], rtol=1e-5)
    moved = params["blocks"]["0"]["qkv"]["kernel"] - PARAMS["blocks"]["0"]["qkv"]["kernel"]
    assert np.abs(moved - (by_adam["blocks"]["0"]["qkv"]["kernel"] - PARAMS["blocks"]["0"]["qkv"]["kernel"])).max() > 1e-3


def test_a_group_that_sets_the_decay_alone_leaves_adams_rate():
    made = optimizer({**MUON, "weight_decay": 0.1, "groups": {"e": {"match": "embed", "weight_decay": 0.0}}}, steps=10)
    assert describe(made, PARAMS)["embed/table"] == {"learning_rate": 3e-3, "weight_decay": 0.0}


def test_describe_says_what_the_update_does():
    config = {**MUON, "weight_decay": 0.3, "groups": {"e": {"match": "embed", "learning_rate": 0.7, "factor": 0.5}}}
    made = optimizer(config, steps=10)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = made.transformation.update(zero, made.transformation.init(PARAMS), PARAMS)
    for path, values in describe(made, PARAMS).items():
        u, p = ({joined(q): x for q, x in leaves_with_paths(tree)}[path] for tree in (updates, PARAMS))
        np.testing.assert_allclose(u, -values["learning_rate"] * values["weight_decay"] * p, rtol=1e-5, atol=1e-9)


CASES = {name: {"name": name, "learning_rate": 0.05} for name in OPTIMIZERS if name != "learned"} | {"muon": MUON}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n == "psgd_kron" else ()) for n in sorted(CASES)])
def test_state_keeps_structure_shapes_and_dtypes_under_a_donating_jit(name):
    tx = make({**CASES[name], "weight_decay": 0.1, "clip": 1.0, "schedule": {"name": "cosine", "warmup": 2}}, steps=10)

    def advance(params, state):
        updates, state = tx.update(GRADS, state, params)
        return optax.apply_updates(params, updates), state

    params, state = jax.tree.map(jnp.copy, PARAMS), jax.tree.map(jnp.copy, tx.init(PARAMS))
    before = jax.tree.map(lambda x: (x.shape, x.dtype), (params, state))
    donating = jax.jit(advance, donate_argnums=(0, 1))
    kept, keeping = (PARAMS, tx.init(PARAMS)), jax.jit(advance)
    for _ in range(3):
        params, state = donating(params, state)
        kept = keeping(*kept)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), (params, state)) == before
    jax.tree.map(np.testing.assert_array_equal, (params, state), kept)


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_a_population_is_its_members_one_by_one(name):
    tx = make({**CASES[name], "schedule": {"name": "linear"}}, steps=10)
    scaled = jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x]), PARAMS)
    grads = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x, x**2]), GRADS)
    state = jax.vmap(tx.init)(scaled)
    for _ in range(2):
        updates, state = jax.jit(jax.vmap(tx.update))(grads, state, scaled)
    for i in range(3):
        member = jax.tree.map(lambda x, i=i: x[i], (grads, scaled))
        alone = tx.init(member[1])
        for _ in range(2):
            single, alone = jax.jit(tx.update)(member[0], alone, member[1])
        jax.tree.map(lambda x, y, i=i: np.testing.assert_allclose(x[i], y, rtol=2e-2, atol=2e-4), updates, single)


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs several devices")
def test_muon_over_sharded_matrices_is_what_it_is_on_one_device():
    devices = jax.devices()[: 2 * (len(jax.devices()) // 2)]
    mesh = jax.make_mesh(
        (2, len(devices) // 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=devices
    )
    rows = jax.NamedSharding(mesh, jax.P("fsdp"))
    params = {"kernel": jnp.sin(jnp.arange(256.0).reshape(16, 16)), "up": jnp.cos(jnp.arange(512.0).reshape(16, 32))}
    tx = make({"name": "muon", "learning_rate": 0.1, "dtype": "float32"}, steps=10)
    expected, _ = jax.jit(tx.update)(params, tx.init(params), params)
    laid = jax.tree.map(lambda x: jax.device_put(x, rows), params)
    state = jax.jit(tx.init)(laid)
    found, _ = jax.jit(tx.update, out_shardings=(rows, None))(laid, state, laid)
    assert all(x.sharding.is_equivalent_to(rows, x.ndim) for x in found.values())
    assert_close(found, expected, rtol=1e-3)


def test_learning_rate_is_the_last_key_of_exactly_one_leaf():
    for config in CASES.values():
        paths = [path for path, _ in leaves_with_paths(make(config, steps=10).init(PARAMS))]
        assert [path[-1] for path in paths].count("learning_rate") == 1


def test_a_config_dict_does_as_a_dict_does():
    plain = {**MUON, "schedule": {"name": "wsd", "warmup": 0.1}, "groups": {"z": {"match": "embed", "factor": 2.0}}}
    frozen = ml_collections.FrozenConfigDict(ml_collections.ConfigDict(plain))
    assert_close(step(make(frozen, steps=10))[0], step(make(plain, steps=10))[0])


def test_the_learner_population_varies_and_logs_it_by_name():
    task = small_classifier()
    tx = make({**MUON, "layouts": {}, "schedule": {"name": "linear", "warmup": 2}}, steps=10)
    learner = population(gradient(task, tx), 2, {"learning_rate": (0.1, 0.2), "learning_rate_adam": (0.0, 0.01)})
    state = learner.init(jax.random.key(0))
    batch = {"inputs": jnp.ones((8, 3)), "targets": jnp.zeros(8, jnp.int32), "mask": jnp.ones(8)}
    after, _ = jax.jit(learner.step)(state, batch, jax.random.key(1))
    found = rates(after["opt"])
    np.testing.assert_allclose(found["learning_rate"], [0.05, 0.1], rtol=1e-6)
    np.testing.assert_allclose(found["learning_rate_adam"], [0.0, 0.005], rtol=1e-6)
    moved = jnp.abs(after["params"]["head"]["bias"] - state["params"]["head"]["bias"]).max(1)
    assert moved[0] == 0 and moved[1] > 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "adamm"}, "optimizer.name='adamm' is unknown; allowed: .*; nearest: 'adamw'"),
        (
            {"learning_rat": 1.0},
            "optimizer.learning_rat is unknown; allowed: learning_rate, .*b1.*; nearest: 'learning_rate'",
        ),
        ({"momentum": 0.9}, "optimizer.momentum is unknown; allowed: "),
        ({"learning_rate": -1.0}, "optimizer.learning_rate=-1.0 is out of range"),
        ({"weight_decay": float("nan")}, "optimizer.weight_decay=nan is out of range"),
        ({"schedule": {"name": "cosine", "warmup": 11}}, "schedule.warmup=11 is out of range: from 0 to the 10 steps"),
        ({"schedule": "cosine"}, r"optimizer.schedule='cosine' is of the wrong type; allowed: Mapping\[str, Any\]"),
        ({"groups": 3}, "optimizer.groups=3 is of the wrong type"),
        ({"groups": {"a": {"match": "w", "learning_rate": -1.0}}}, "groups.match='w': learning_rate=-1.0 is out of range"),
        ({"groups": {"a": {"match": "w", "weight_decay": float("nan")}}}, "groups.match='w': weight_decay=nan is out of range"),
        ({"b1": 1.0}, "optimizer.b1=1.0 is out of range: 0 or above, below 1"),
        ({"b2": -0.1}, "optimizer.b2=-0.1 is out of range: 0 or above, below 1"),
        ({"eps": float("nan")}, "optimizer.eps=nan is out of range: a finite number, 0 or above"),
        ({"name": "sgd", "momentum": 1.5}, "optimizer.momentum=1.5 is out of range"),
        ({"name": "rmsprop", "decay": 1.0}, "optimizer.decay=1.0 is out of range: 0 or above, below 1"),
        ({"name": "adafactor", "decay": 0.0}, "optimizer.decay=0.0 is out of range: a finite number above 0"),
        ({"name": "muon", "adam_learning_rate": -1.0}, "optimizer.adam_learning_rate=-1.0 is out of range"),
        ({"name": "soap", "b_statistics": 1.0}, "optimizer.b_statistics=1.0 is out of range"),
        ({"name": "shampoo", "b2": 1.1}, "optimizer.b2=1.1 is out of range: from 0 to 1"),
        ({"name": "psgd_kron", "initial": 0.0}, "optimizer.initial=0.0 is out of range: a finite number above 0"),
        ({"name": "psgd_kron", "momentum": 1.0}, "optimizer.momentum=1.0 is out of range"),
        ({"name": "prodigy", "first": 0.0}, "optimizer.first=0.0 is out of range: a finite number above 0"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_one_line_before_any_parameter(change, message):
    with pytest.raises(ValueError, match=message) as error:
        make({"name": "adamw", "learning_rate": 0.1, **change}, steps=10)
    assert "\n" not in str(error.value)


def test_muon_keeps_the_name_of_its_own_group():
    with pytest.raises(ValueError, match="optimizer.groups.adam: this optimizer has a group of that name"):
        make({**MUON, "groups": {"adam": {"match": "bias", "factor": 1.0}}}, steps=10)


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="optimizer lacks optimizer.name; given: learning_rate"):
        make({"learning_rate": 0.1}, steps=10)
    with pytest.raises(ValueError, match="optimizer lacks optimizer.learning_rate; given: name"):
        make({"name": "sgd"}, steps=10)


def test_muon_without_a_matrix_is_refused():
    with pytest.raises(ValueError, match="muon has no parameter"):
        make({"name": "muon", "learning_rate": 0.1}, steps=10).init({"bias": jnp.ones(3), "head": {"kernel": jnp.ones((3, 3))}})


@pytest.mark.parametrize(
    "config",
    [
        {"name": "shampoo", "b2": 1.0},
        {"name": "adafactor", "decay": 1.5},
        {"name": "prodigy", "decay": 2.0},
        {"name": "muon", "adam_learning_rate": None},
        {"name": "adagrad", "initial": 0.0},
    ],
)
def test_what_a_name_means_in_an_optimizer_says_its_range(config):
    make({"learning_rate": 0.1, **config}, steps=10)


@pytest.mark.parametrize("name", sorted(CASES))
def test_leaves_without_entries_go_along(name):
    """Vectors and matrices of a side of 0, of every optimizer: beside others, which move by it."""
    params = {"w": jnp.ones((3, 2)), "none": jnp.ones((0, 2)), "empty": jnp.ones((2, 0)), "vector": jnp.ones(0)}
    tx = make({"name": name, "learning_rate": 0.05}, steps=10)
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    for tree, like in ((updates, params), (after, state)):
        assert jax.tree.map(lambda x: x.shape, tree) == jax.tree.map(lambda x: x.shape, like)
