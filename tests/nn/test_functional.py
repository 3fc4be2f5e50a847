"""NNX modules as pure functions: each NNX trap by name."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from research.core.tree import leaves_with_paths
from research.nn.functional import functional, param

KEY = jax.random.key(0)


class Scale(nnx.Module):
    def __init__(self, rngs):
        self.weight = param(jax.random.normal(rngs.params(), (3,)), "embed")


class Twelve(nnx.Module):
    """x -> f_11(... f_0(x)), f_i(x) = 2 x + weight_i: not commutative, so that an exchange of layers shows."""

    def __init__(self, rngs):
        self.layers = nnx.List([Scale(rngs) for _ in range(12)])

    def __call__(self, x):
        for layer in self.layers:
            x = 2 * x + layer.weight[...]
        return x


class Noisy(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.first = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.second(self.first(self.linear(x))))

    def masks(self, x):
        return self.first(x), self.second(x)


def test_twelve_equal_layers_keep_their_order():
    init, apply, _, _ = functional(Twelve)
    variables = init(KEY)
    x = jnp.arange(3.0)
    expected = x
    for i in range(12):
        expected = 2 * expected + variables["params"]["layers"][str(i)]["weight"]
    np.testing.assert_allclose(apply(variables, x)[0], expected, rtol=1e-6)
    # and through jit and a flattening, which sorts "10" before "2"
    leaves, structure = jax.tree.flatten(variables)
    np.testing.assert_allclose(jax.jit(apply)(structure.unflatten(leaves), x)[0], expected, rtol=1e-6)


def test_variables_are_plain_nested_dicts_without_a_generator():
    variables = functional(Noisy).init(KEY)
    assert set(variables) == {"params", "state", "frozen"}
    assert {"/".join(p) for p, _ in leaves_with_paths(variables["params"])} == {
        "linear/kernel", "linear/bias", "norm/scale", "norm/bias"}  # fmt: skip
    assert {"/".join(p) for p, _ in leaves_with_paths(variables["state"])} == {"norm/mean", "norm/var"}
    assert all(type(x) is type(jnp.zeros(())) for x in jax.tree.leaves(variables))


def test_evaluation_turns_dropout_and_batch_statistics_off():
    f = functional(Noisy)
    variables = f.init(KEY)
    x = jax.random.normal(jax.random.key(1), (8, 4)) + 3
    one, state = f.apply(variables, x, key=jax.random.key(2))
    two, _ = f.apply(variables, x, key=jax.random.key(3))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(state["norm"]["mean"], variables["state"]["norm"]["mean"])
    np.testing.assert_allclose(one, x @ variables["params"]["linear"]["kernel"], rtol=1e-4)  # statistics 0 and 1
    np.testing.assert_array_equal(one, f.apply(variables, x)[0])  # no key needed


def test_training_draws_from_the_steps_key_and_updates_batch_statistics():
    f = functional(Noisy)
    variables = f.init(KEY)
    x = jax.random.normal(jax.random.key(1), (8, 4)) + 3
    one, state = f.apply(variables, x, key=jax.random.key(2), train=True)
    again, _ = f.apply(variables, x, key=jax.random.key(2), train=True)
    other, _ = f.apply(variables, x, key=jax.random.key(3), train=True)
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    assert not np.array_equal(state["norm"]["mean"], variables["state"]["norm"]["mean"])
    assert jax.tree.structure(state) == jax.tree.structure(variables["state"])


def test_two_dropouts_of_a_module_draw_apart():
    f = functional(Noisy)
    (first, second), _ = f.apply(f.init(KEY), jnp.ones((8, 4)), key=KEY, train=True, method="masks")
    assert not np.array_equal(first, second)


def test_training_with_a_generator_and_no_key_is_refused():
    f = functional(Noisy)
    with pytest.raises(ValueError, match=r"^Noisy draws random numbers in training \(first/rngs/.*apply needs a key$"):
        f.apply(f.init(KEY), jnp.ones((8, 4)), train=True)


def test_missing_variables_are_named_by_path():
    f = functional(Twelve)
    variables = f.init(KEY)
    del variables["params"]["layers"]["7"]
    with pytest.raises(ValueError, match=r"^variables lack params/layers/7/weight"):
        f.apply(variables, jnp.ones(3))


def test_a_bare_array_in_a_module_is_refused():
    class Table(nnx.Module):
        def __init__(self, rngs):
            self.table = jnp.arange(3.0)

    with pytest.raises(ValueError, match=r"^Table: table is a bare array"):
        functional(Table)


def test_variables_made_during_a_call_are_refused():
    class Late(nnx.Module):
        def __init__(self, rngs):
            self.count = nnx.BatchStat(jnp.zeros(()))

        def __call__(self, x):
            self.late = nnx.BatchStat(x)
            return x

    f = functional(Late)
    with pytest.raises(ValueError, match=r"^Late.__call__ adds or removes variables"):
        f.apply(f.init(KEY), jnp.ones(()))


def test_axes_are_those_given_to_param_and_match_the_tree():
    class Mixed(nnx.Module):
        def __init__(self, rngs):
            self.kernel = param(jnp.zeros((2, 3)), "embed", None)
            self.bare = nnx.Param(jnp.zeros(3))
            self.norm = nnx.BatchNorm(3, rngs=rngs)

    f = functional(Mixed)
    assert f.axes["params"]["kernel"] == jax.P("embed", None)
    assert f.axes["params"]["bare"] == jax.P()
    assert jax.tree.structure(f.axes) == jax.tree.structure(f.init(KEY))


def test_a_shared_parameter_is_stored_once():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.a = Scale(rngs)
            self.b = self.a

        def __call__(self, x):
            return x * self.a.weight[...] * self.b.weight[...]

    f = functional(Tied)
    variables = f.init(KEY)
    assert [p for p, _ in leaves_with_paths(variables["params"])] == [("a", "weight")]
    weight = variables["params"]["a"]["weight"]
    np.testing.assert_allclose(f.apply(variables, jnp.ones(3))[0], weight**2, rtol=1e-6)


def test_ask_answers_from_the_module_alone():
    class Sized(Scale):
        def size(self, times):
            return self.weight.shape[0] * times

    assert functional(Sized).ask("size", 4) == 12


def test_nothing_leaks_from_traces_and_equal_traces_are_equal():
    f = functional(Noisy)
    variables = f.init(KEY)
    x = jnp.ones((8, 4))

    def loss(variables, key):
        return f.apply(variables, x, key=key, train=True)[0].sum()

    with jax.checking_leaks():
        jax.jit(jax.grad(loss))(variables, KEY)
    gc.collect()
    assert str(jax.make_jaxpr(loss)(variables, KEY)) == str(jax.make_jaxpr(loss)(variables, KEY))


def test_vmap_over_variables_and_keys_equals_one_by_one():
    f = functional(Noisy)
    keys = jax.random.split(KEY, 3)
    stacked = jax.vmap(f.init)(keys)
    x = jax.random.normal(KEY, (8, 4))

    def run(variables, key):
        return f.apply(variables, x, key=key, train=True)

    many, states = jax.jit(jax.vmap(run))(stacked, keys)
    for i in range(3):
        one, state = run(jax.tree.map(lambda v, i=i: v[i], stacked), keys[i])
        np.testing.assert_allclose(many[i], one, atol=2e-6)
        np.testing.assert_allclose(states["norm"]["mean"][i], state["norm"]["mean"], atol=2e-6)


def test_init_and_apply_work_under_a_mesh_of_auto_axes():
    f = functional(Twelve)
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        variables = jax.jit(f.init)(KEY)
        output, _ = jax.jit(f.apply)(variables, jnp.ones(3))
        functional(Twelve)  # built under the mesh, too
    np.testing.assert_allclose(output, f.apply(f.init(KEY), jnp.ones(3))[0], rtol=1e-6)


def test_init_inside_jit_equals_init_outside():
    f = functional(Noisy)
    jax.tree.map(np.testing.assert_array_equal, f.init(KEY), jax.jit(f.init)(KEY))
