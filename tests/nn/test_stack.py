"""Layers written out and layers scanned are one function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.core.types import Spec
from research.nn import stack
from research.nn.functional import functional, param

KEY = jax.random.key(0)


class Layer(nnx.Module):
    """x -> a x + b (kind 0) or a sin(x) + b (kind 1), with dropout and a count of calls."""

    def __init__(self, kind, rngs):
        self.kind = kind
        self.a = param(jax.random.normal(rngs.params(), (3,)), "embed")
        self.b = nnx.Param(jax.random.normal(rngs.params(), (3,)))
        self.calls = nnx.BatchStat(jnp.zeros(()))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        self.calls[...] = self.calls[...] + 1
        return self.dropout(self.a[...] * (x if self.kind == 0 else jnp.sin(x)) + self.b[...])


class Model(nnx.Module):
    def __init__(self, layers, scan, remat, rngs):
        self.scan, self.remat = scan, remat
        self.blocks = stack.build(Layer, layers, 2, scan, rngs)

    def __call__(self, x):
        return stack.run(self.blocks, lambda block, x, _: (block(x), x), x, scan=self.scan, remat=self.remat)

    def specs(self):
        return stack.cache_specs(self.blocks, lambda block: Spec((3,), jnp.float32, ("embed",)), 6, self.scan)


def made(scan, remat=("none",)):
    return functional(lambda r: Model(6, scan, remat, r))


def run(f, variables, x, **options):
    return jax.jit(lambda v, x, options: f.apply(v, x, train="key" in options, **options))(variables, x, options)


def test_scanned_equals_written_out_after_conversion():
    written, scanned = made(False), made(True)
    variables = written.init(KEY)
    x = jnp.arange(3.0)
    converted = {
        name: {} if name == "frozen" else {"blocks": stack.stack_layers(variables[name]["blocks"], 2)} for name in variables
    }
    assert jax.tree.structure(converted) == jax.tree.structure(scanned.init(KEY))
    (out, inputs), state = run(written, variables, x)
    (out_scanned, inputs_scanned), state_scanned = run(scanned, converted, x)
    np.testing.assert_allclose(out_scanned, out, rtol=1e-6)
    expected = stack.stack_layers(inputs, 2)  # what each layer was given, in order
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), inputs_scanned, expected)
    assert jax.tree.leaves(state) == [1.0] * 6
    np.testing.assert_array_equal(jax.tree.leaves(state_scanned), np.ones((2, 3)))
    back = stack.unstack_layers(converted["params"]["blocks"])
    jax.tree.map(np.testing.assert_array_equal, back, variables["params"]["blocks"])


def test_scanned_layers_start_apart_and_are_named():
    f = made(True)
    params = f.init(KEY)["params"]["blocks"]
    assert params["0"]["a"].shape == (3, 3)
    assert len(np.unique(np.asarray(params["0"]["a"]))) == 9
    assert f.axes["params"]["blocks"]["0"]["a"] == jax.P("layers", "embed")
    assert f.axes["params"]["blocks"]["0"]["b"] == jax.P("layers", None)
    assert made(False).axes["params"]["blocks"]["0"]["a"] == jax.P("embed")


@pytest.mark.parametrize("scan", [False, True])
def test_layers_draw_apart_and_from_the_key(scan):
    f = made(scan)
    variables = f.init(KEY)
    ones = jax.tree.map(jnp.ones_like, variables["params"])
    (_, inputs), _ = run(f, {**variables, "params": ones}, jnp.ones(3), key=KEY)
    flat = stack.unstack_layers(inputs) if scan else inputs
    dropped = [np.asarray(flat[str(i)]) == 0 for i in range(1, 6)]
    for alike in (dropped[0::2], dropped[1::2]):  # where scanned, these are one module
        assert any(not np.array_equal(alike[0], other) for other in alike[1:])
    again, _ = run(f, {**variables, "params": ones}, jnp.ones(3), key=KEY)
    other, _ = run(f, {**variables, "params": ones}, jnp.ones(3), key=jax.random.key(5))
    jax.tree.map(np.testing.assert_array_equal, again[1], inputs)
    assert not all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(other[1]), jax.tree.leaves(inputs), strict=True))


@pytest.mark.parametrize(
    "scan, remat", [(False, ["full"]), (True, ["full"]), (True, ["dots"]), (True, ["weights"]), (True, ["none", "full"])]
)
def test_rematerialization_changes_no_value_and_no_gradient(scan, remat):
    plain, again = made(scan), made(scan, remat)
    variables = plain.init(KEY)

    def both(f):
        def loss(params):
            (out, _), _ = f.apply({**variables, "params": params}, jnp.arange(3.0), key=KEY, train=True)
            return jnp.sum(out**2)

        return jax.jit(jax.value_and_grad(loss))(variables["params"])

    value, grads = both(plain)
    value_again, grads_again = both(again)
    np.testing.assert_allclose(value_again, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grads_again, grads)


def test_specs_of_scanned_layers_have_a_leading_axis():
    assert made(True).ask("specs")["1"] == Spec((3, 3), jnp.float32, ("layers", "embed"))
    assert set(made(False).ask("specs")) == {"0", "1", "2", "3", "4", "5"}
