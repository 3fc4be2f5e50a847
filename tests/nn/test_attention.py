"""The attention layer: one function in all implementations, its derivatives, and its cache with every kind of mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from research.nn.attention import Attention, AttentionConfig
from research.nn.functional import functional
from research.nn.masks import causally, parse

KEY = jax.random.key(0)
VALUES, GRADIENTS = 2e-5, 1e-4
SHARED = ["causal()", "window(8, 0)", "window(9, 0) | global_tokens(3)", "~prefix(2)", "window(3, 4)"]
APART = ["per_head(causal(), window(8, 0), full(), prefix(5))", "random_blocks(0, 8, 2, 150, heads=4) | window(8, 0)"]


@functools.cache
def layer(mask, causal=True, dtype="float32", implementation=None):
    config = AttentionConfig(16, 4, 2, 4, 1e4, 1.0, "normal", dtype, implementation)
    mask = causally(parse(mask, "mask")) if causal else parse(mask, "mask")
    return functional(lambda rngs: Attention(config, mask, rngs))


def inputs(length=150, batch=2):
    return jax.random.normal(jax.random.key(1), (batch, length, 16))


def loss(f, variables, params, x):
    return read(f, variables, params, x)[0]


def read(f, variables, params, x):
    """(sum of the outputs' sines, outputs)."""
    out = f.apply({**variables, "params": params}, x)[0]
    return jnp.sum(jnp.sin(out)), out


def slopes(f, variables, x):
    """(outputs, gradients of parameters and inputs)."""
    run = jax.jit(jax.value_and_grad(functools.partial(read, f, variables), (0, 1), has_aux=True))
    (_, out), slope = run(variables["params"], x)
    return out, slope


def near(got, expected, most):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=most * max(1, np.abs(b).max())), got, expected)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "mask, causal",
    [(SHARED[0], True), (SHARED[2], True), (APART[0], True), (SHARED[4], False), slow(SHARED[1], True), slow(SHARED[3], True),
     slow(SHARED[4], True), slow(APART[1], True), slow(SHARED[3], False)],
)  # fmt: skip
def test_the_chosen_implementation_equals_the_reference_in_values_and_gradients(mask, causal):
    f, g = layer(mask, causal), layer(mask, causal, implementation="reference")
    variables = f.init(KEY)
    (out, slope), (expected, expected_slope) = (slopes(one, variables, inputs()) for one in (f, g))
    near(out, expected, VALUES)
    near(slope, expected_slope, GRADIENTS)


@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
def test_an_implementation_that_does_not_run_here_is_one_line_by_key_from_shapes_alone(implementation):
    f = layer(SHARED[0], implementation=implementation)
    with pytest.raises(ValueError) as error:
        jax.eval_shape(f.apply, jax.eval_shape(f.init, KEY), inputs())
    says = f"model.attention.implementation='{implementation}' does not support this: implementation: '{implementation}' does"
    assert str(error.value).startswith(says) and "\n" not in str(error.value)


def test_in_bfloat16_the_output_is_float32_and_near():
    exact, low = layer(SHARED[2]), layer(SHARED[2], dtype="bfloat16")
    variables = exact.init(KEY)
    (a, exact_slopes), (b, low_slopes) = (slopes(f, variables, inputs()) for f in (exact, low))
    assert b.dtype == jnp.float32
    assert 1e-5 < float(jnp.abs(a - b).max()) < 0.05
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.1 * np.abs(b).max()), low_slopes, exact_slopes)


@pytest.mark.slow
def test_a_gradient_step_is_differentiated():
    """Reverse over reverse, as MAML and hypergradients do, of the layer's parameters before a step of gradient descent."""
    mask = SHARED[2]
    variables = layer(mask).init(KEY)

    def after_a_step(f):
        def outer(params, x):
            inner = jax.grad(functools.partial(loss, f, variables))(params, x)
            return loss(f, variables, jax.tree.map(lambda p, g: p - 0.01 * g, params, inner), x[:, ::-1])

        return jax.jit(jax.grad(outer))(variables["params"], inputs(40))

    near(after_a_step(layer(mask)), after_a_step(layer(mask, implementation="reference")), GRADIENTS)


@pytest.mark.parametrize("mask", [SHARED[2], slow(SHARED[1]), slow(APART[0])])
def test_members_of_a_population_are_computed_as_one_by_one(mask):
    f = layer(mask)
    several = jax.vmap(f.init)(jax.random.split(KEY, 2))
    run = jax.jit(lambda v: f.apply(v, inputs())[0])
    both = jax.jit(jax.vmap(run))(several)
    for i in range(2):
        near(both[i], run(jax.tree.map(lambda x, i=i: x[i], several)), VALUES)


@pytest.mark.parametrize("mask", [SHARED[2], slow(APART[0])])
def test_a_mesh_splits_the_batch_and_nothing_gathers_it(mask):
    f, x = layer(mask), inputs(batch=8)
    variables = f.init(KEY)
    _, expected = slopes(f, variables, x)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        everywhere, rows = NamedSharding(mesh, jax.P()), NamedSharding(mesh, jax.P("data"))
        params = jax.device_put(variables["params"], everywhere)
        x = jax.device_put(x, rows)
        run = jax.jit(jax.grad(functools.partial(loss, f, variables), (0, 1))).lower(params, x).compile()
        near(run(params, x), expected, GRADIENTS)
    assert "all-gather" not in run.as_text() and "all-to-all" not in run.as_text()


def decoded(f, variables, x, sizes, context):
    """(outputs for `x`, read in pieces of `sizes` through a cache that starts empty; the cache's Spec)."""
    step = jax.jit(lambda x, cache, at: f.apply(variables, x, cache, at, method="decode")[0])
    specs = f.ask("cache_specs", x.shape[0], context)
    cache, at, out = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), specs), 0, []
    for size in sizes:
        y, cache = step(x[:, at : at + size], cache, jnp.int32(at))
        out.append(y)
        at += size
    assert at == x.shape[1]
    return jnp.concatenate(out, axis=1), specs["key"]


MASKS = [
    ("full()", "context", 20),
    ("window(3, 0)", "window", 4),
    slow("window(0, 0)", "window", 1),
    slow("window(19, 0)", "context", 20),
    slow("window(3, 2) & strided(2)", "window", 4),
    slow("dilated(2, 0, 3)", "window", 7),
    slow("window(3, 0) | window(5, 0)", "window", 6),
    ("window(3, 0) | global_tokens(2)", "context", 20),
    slow("window(3, 0) | global_tokens([1, 7])", "context", 20),
    slow("~window(3, 0) | window(0, 0)", "context", 20),
    slow("document([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2])", "context", 20),
    ("per_head(full(), window(3, 0), prefix(2), strided(3))", "context", 20),
    slow("window(5, 0) & per_head(full(), window(3, 0), prefix(2), strided(3))", "context", 20),
    slow("bigbird(0, 2, 20, count=1)", "context", 20),
]


@pytest.mark.parametrize("mask, axis, slots", MASKS)
def test_decoding_equals_the_whole_pass_with_every_kind_of_mask(mask, axis, slots):
    """Pieces longer than the window, which overwrite what they still read, and single tokens."""
    f, x = layer(mask), inputs(20)
    variables = f.init(KEY)
    got, spec = decoded(f, variables, x, (6, 1, 1, 6, 6), 20)
    np.testing.assert_allclose(got, jax.jit(lambda x: f.apply(variables, x)[0])(x), atol=VALUES)
    assert spec.axes[1] == axis and spec.shape == (2, slots, 2, 4)


def test_a_rolling_cache_goes_on_for_ever():
    f, x = layer("window(3, 0)"), inputs(30)
    variables = f.init(KEY)
    got, _ = decoded(f, variables, x, (1,) * 30, 20)
    np.testing.assert_allclose(got, f.apply(variables, x)[0], atol=VALUES)
