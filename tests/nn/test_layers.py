"""Single layers against their definitions in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.nn import checks
from research.nn.conv import Conv, ShortConv
from research.nn.functional import functional
from research.nn.gru import GRU
from research.nn.linear import KERNELS, Linear
from research.nn.losses import cross_entropy
from research.nn.mlp import MLPS, feed_forward, squared_relu
from research.nn.norms import GroupNorm, LayerNorm, RMSNorm
from research.nn.position import LARGEST_CONSTANT, rotary_tables, rotate
from research.nn.products import contract, matmul

KEY = jax.random.key(0)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def applied(make, *inputs, variables=None, method="__call__"):
    f = functional(make)
    variables = f.init(KEY) if variables is None else variables
    return jax.jit(lambda v, *x: f.apply(v, *x, method=method)[0])(variables, *inputs), variables["params"]


# Products


@pytest.mark.parametrize("inputs, outputs", [(3, 5), (7, 2)])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.06)])
def test_matmul_is_a_matrix_product_in_values_and_gradients(inputs, outputs, dtype, tolerance):
    x, kernel, weights = normal(0, 4, 2, inputs), normal(1, inputs, outputs), normal(2, 4, 2, outputs)

    def both(product):
        return jax.value_and_grad(lambda x, kernel: jnp.sum(product(x, kernel) * weights), (0, 1))(x, kernel)

    value, grads = both(lambda x, kernel: matmul(x, kernel, dtype))
    expected, expected_grads = both(lambda x, kernel: jnp.einsum("bti,io->bto", x, kernel))
    np.testing.assert_allclose(value, expected, rtol=tolerance)
    for a, b in zip(grads, expected_grads, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=tolerance * 3)


@pytest.mark.parametrize("outputs", [3, 300])
@pytest.mark.parametrize("product", [functools.partial(contract, "ni,io->no"), matmul])
def test_bfloat16_rounds_operands_and_cotangents_and_sums_in_float32(product, outputs):
    a, b, g = normal(0, 4, 256), normal(1, 256, outputs), normal(2, 4, outputs)

    def low(x):
        return np.asarray(x.astype(jnp.bfloat16), np.float64)

    out, pullback = jax.vjp(lambda a, b: product(a, b, "bfloat16"), a, b)
    np.testing.assert_allclose(out, low(a) @ low(b), rtol=1e-5, atol=1e-4)
    d_a, d_b = pullback(g)
    np.testing.assert_allclose(d_a, low(g) @ low(b).T, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(d_b, low(a).T @ low(g), rtol=1e-5, atol=1e-5)


def test_float32_products_have_forward_mode_derivatives():
    x, kernel = normal(0, 3, 5), normal(1, 5, 2)
    _, tangent = jax.jvp(lambda x: matmul(x, kernel, "float32"), (x,), (x,))
    np.testing.assert_allclose(tangent, x @ kernel, rtol=1e-5)


@pytest.mark.parametrize(
    "init, deviation", [("normal", 0.1), ("he_normal", 0.02**0.5), ("uniform", 0.1 / 3**0.5), ("zeros", 0)]
)
def test_kernels_start_with_their_deviation(init, deviation):
    kernel = KERNELS[init](KEY, (100, 400), 100)
    assert float(kernel.std()) == pytest.approx(deviation, rel=0.03)


def test_linear_starts_its_bias_as_pytorch_does_where_the_kernel_does():
    _, params = applied(
        lambda r: Linear(4, 9, ("embed", None), dtype="float32", bias=True, init="uniform", rngs=r), normal(0, 2, 4)
    )
    bias = np.asarray(params["bias"])
    assert bias.std() > 0 and np.abs(bias).max() <= 0.5


# Norms


def test_rms_norm_divides_by_the_root_mean_square_in_float32():
    x = (normal(0, 2, 3, 8) * 100).astype(jnp.bfloat16)
    got, _ = applied(lambda r: RMSNorm(8, rngs=r), x)
    exact = np.asarray(x, np.float64)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, exact / np.sqrt((exact**2).mean(-1, keepdims=True)), rtol=1e-5)


def test_layer_norm_has_mean_zero_and_variance_one():
    got, _ = applied(lambda r: LayerNorm(8, rngs=r), normal(0, 2, 3, 8) + 1000)
    np.testing.assert_allclose(got.mean(-1), np.zeros((2, 3)), atol=1e-4)
    np.testing.assert_allclose(got.var(-1), np.ones((2, 3)), rtol=1e-3)


def test_group_norm_normalizes_each_example_and_group_by_itself():
    x = normal(0, 2, 4, 4, 6) * jnp.array([1.0, 2, 3, 40, 50, 60])[None, None, None] + 7
    got, _ = applied(lambda r: GroupNorm(6, 2, rngs=r), x)
    exact = np.asarray(x, np.float64).reshape(2, 16, 2, 3)
    exact = (exact - exact.mean((1, 3), keepdims=True)) / exact.std((1, 3), keepdims=True)
    np.testing.assert_allclose(got, exact.reshape(x.shape), atol=1e-4)


# Positions


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    q, k = normal(0, 1, 1, 1, 8), normal(1, 1, 1, 1, 8)

    def score(i, j):
        return jnp.sum(rotate(q, rotary_tables(i, 1, 8, 1e4)) * rotate(k, rotary_tables(j, 1, 8, 1e4)))

    np.testing.assert_allclose(score(7, 3), score(104, 100), atol=1e-4)
    assert abs(float(score(7, 3) - score(7, 4))) > 1e-2
    turned = rotate(q, rotary_tables(9, 1, 8, 1e4))
    np.testing.assert_allclose(jnp.linalg.norm(turned), jnp.linalg.norm(q), rtol=1e-6)


@pytest.mark.parametrize("start", [0, 5000, 1_000_000])
def test_tables_are_exact_at_any_position_traced_or_not(start):
    length, head_dim, base = 16, 8, 1e4
    angle = (start + np.arange(length))[:, None] * base ** (-np.arange(0, head_dim, 2) / head_dim)
    for tables in (
        rotary_tables(start, length, head_dim, base),
        jax.jit(rotary_tables, static_argnums=(1, 2, 3))(start, length, head_dim, base),
    ):
        np.testing.assert_allclose(tables[0], np.cos(angle), atol=2e-6 + start * 1e-9)
        np.testing.assert_allclose(tables[1], np.sin(angle), atol=2e-6 + start * 1e-9)


def test_short_tables_are_constants_and_long_ones_are_not():
    assert isinstance(rotary_tables(0, 16, 8, 1e4)[0], np.ndarray)
    long = jax.eval_shape(lambda: rotary_tables(0, LARGEST_CONSTANT, 8, 1e4)[0])
    assert long.shape == (LARGEST_CONSTANT, 4)


def test_an_odd_head_dim_is_refused():
    with pytest.raises(ValueError, match=r"head_dim=5 is odd; nearest: 4 or 6$"):
        rotary_tables(0, 4, 5, 1e4)


# Feed-forward


@pytest.mark.parametrize("kind", MLPS)
def test_feed_forward_is_its_formula(kind):
    x = normal(0, 2, 3, 4)
    got, p = applied(lambda r: feed_forward(kind, 4, 6, dtype="float32", out_init="normal", rngs=r), x)
    activation = {"squared_relu": lambda a: jax.nn.relu(a) ** 2, "swiglu": jax.nn.silu}.get(kind) or getattr(jax.nn, kind)
    if kind == "swiglu":
        inner = activation(x @ p["gate"]["kernel"]) * (x @ p["up"]["kernel"])
    else:
        inner = activation(x @ p["up"]["kernel"])
    np.testing.assert_allclose(got, inner @ p["down"]["kernel"], atol=1e-5)


def test_squared_relu():
    np.testing.assert_array_equal(squared_relu(jnp.array([-2.0, 0.0, 3.0])), [0.0, 0.0, 9.0])


# Convolutions


def test_short_conv_is_causal_and_starts_as_the_identity():
    x = normal(0, 2, 9, 3)
    out, params = applied(lambda r: ShortConv(3, 4, rngs=r), x)
    np.testing.assert_array_equal(out, x)
    kernel = normal(1, 4, 3)
    out, _ = applied(lambda r: ShortConv(3, 4, rngs=r), x, variables={"params": {"kernel": kernel}, "state": {}, "frozen": {}})
    padded = np.concatenate([np.zeros((2, 3, 3)), x], axis=1)
    expected = sum(np.asarray(kernel[i]) * padded[:, 3 - i : 12 - i] for i in range(4))
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("space, window, stride, padding", [(1, 5, 2, 1), (2, 3, 1, 1), (2, 2, 2, 0)])
def test_both_convolutions_are_the_same_function(space, window, stride, padding):
    x = normal(0, 2, *(7, 6)[:space], 3)

    def conv(implementation):
        return lambda r: Conv(3, 4, space=space, window=window, stride=stride, padding=padding, bias=True, init="uniform",
                              dtype="float32", implementation=implementation, rngs=r)  # fmt: skip

    lax, params = applied(conv("lax"), x)
    patches, same = applied(conv("patches"), x)
    jax.tree.map(np.testing.assert_array_equal, params, same)
    np.testing.assert_allclose(lax, patches, atol=2e-5)


# Recurrence


@pytest.mark.parametrize("reverse", [False, True])
def test_gru_is_its_recurrence(reverse):
    x = normal(0, 2, 5, 3)
    got, p = applied(lambda r: GRU(3, 4, reverse=reverse, init="uniform", dtype="float32", unroll=2, rngs=r), x)
    p, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (p, x))

    def sigmoid(a):
        return 1 / (1 + np.exp(-a))

    h, expected = np.zeros((2, 4)), np.zeros((2, 5, 4))
    for t in reversed(range(5)) if reverse else range(5):
        reset, update, new = np.split(x[:, t] @ p["input_kernel"] + p["input_bias"], 3, axis=-1)
        reset_h, update_h, new_h = np.split(h @ p["hidden_kernel"] + p["hidden_bias"], 3, axis=-1)
        z = sigmoid(update + update_h)
        h = (1 - z) * np.tanh(new + sigmoid(reset + reset_h) * new_h) + z * h
        expected[:, t] = h
    np.testing.assert_allclose(got, expected, atol=1e-5)


# Losses


def test_cross_entropy_is_minus_the_log_probability_even_for_large_logits():
    logits, targets = normal(0, 2, 3, 5) * 1000, jnp.array([[0, 1, 2], [3, 4, 0]])
    loss, nll = cross_entropy(logits, targets)
    exact = np.asarray(logits, np.float64)
    normalizer = np.log(np.exp(exact - exact.max(-1, keepdims=True)).sum(-1)) + exact.max(-1)
    expected = normalizer - np.take_along_axis(exact, np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(nll, expected, rtol=1e-5, atol=1e-3)
    np.testing.assert_array_equal(loss, nll)


def test_label_smoothing_is_cross_entropy_to_mixed_targets_and_z_loss_is_added():
    logits, targets = normal(0, 4, 5), jnp.array([0, 1, 2, 3])
    log_p = jax.nn.log_softmax(logits)
    mixed = 0.9 * jax.nn.one_hot(targets, 5) + 0.1 / 5
    loss, nll = cross_entropy(logits, targets, label_smoothing=0.1)
    np.testing.assert_allclose(loss, -(mixed * log_p).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(nll, -log_p[jnp.arange(4), targets], rtol=1e-5)
    with_z, _ = cross_entropy(logits, targets, z_loss=0.5)
    np.testing.assert_allclose(with_z, nll + 0.5 * jax.nn.logsumexp(logits, -1) ** 2, rtol=1e-5)


# Sizes that cannot work


def test_sizes_that_do_not_divide_name_both_keys_and_the_nearest():
    with pytest.raises(ValueError, match=r"^model.width=100 is not divisible by model.heads=3; nearest: 99 or 102$"):
        checks.divisible("model.width", 100, "model.heads", 3)
    with pytest.raises(ValueError, match=r"^model.heads=2 is not divisible by model.kv_heads=4; nearest: 4$"):
        checks.divisible("model.heads", 2, "model.kv_heads", 4)
    checks.divisible("model.width", 99, "model.heads", 3)


def test_modules_hold_no_numpy_or_jax_array_beside_variables():
    class Holder(nnx.Module):
        def __init__(self, rngs):
            self.sizes = (1, 2)

    functional(Holder)  # static values are fine
