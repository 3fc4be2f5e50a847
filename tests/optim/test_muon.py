"""Muon against its formulas in NumPy and against optax.contrib.muon where the two are the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import muon as optax_muon

from research.optim.muon import COEFFICIENTS, SCALES, iterations, orthogonalized, scale_by_muon

JORDAN = (3.4445, -4.7750, 2.0315)


def with_singular_values(key, m, n, values):
    """[m, n] float32 with these singular values."""
    u, v = (
        np.linalg.qr(np.asarray(jax.random.normal(jax.random.fold_in(key, i), (s, s)), np.float64))[0]
        for i, s in ((0, m), (1, n))
    )
    middle = np.zeros((m, n))
    np.fill_diagonal(middle, values)
    return (u @ middle @ v).astype(np.float32)


def numpy_newton_schulz(x, steps=5):
    x = np.asarray(x, np.float64)
    x = x / np.linalg.norm(x)
    for _ in range(steps):
        gram = x @ x.T
        x = JORDAN[0] * x + (JORDAN[1] * gram + JORDAN[2] * gram @ gram) @ x
    return x


def run(tx, grads):
    return jax.jit(tx.update)(grads, tx.init(grads))


@pytest.mark.parametrize("dtype, low, high", [("float32", 0.68, 1.14), ("bfloat16", 0.66, 1.16)])
def test_the_update_is_orthogonal_and_keeps_the_singular_vectors(dtype, low, high):
    x = with_singular_values(jax.random.key(0), 24, 40, np.geomspace(0.05, 3, 24))
    y = np.asarray(
        orthogonalized(jnp.asarray(x), iterations("jordan", 5), {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[dtype])
    )
    values = np.linalg.svd(y, compute_uv=False)
    assert low <= values.min() and values.max() <= high
    u, _, v = np.linalg.svd(x, full_matrices=False)
    inside = u.T @ y @ v.T
    np.testing.assert_allclose(inside, np.diag(np.diag(inside)), atol=1e-4 if dtype == "float32" else 0.05)


def test_polar_express_ends_nearer_to_orthogonal_than_jordan():
    x = jnp.asarray(with_singular_values(jax.random.key(1), 16, 16, np.geomspace(0.01, 1, 16)))
    off = {
        name: np.abs(np.linalg.svd(np.asarray(orthogonalized(x, iterations(name, 6))), compute_uv=False) - 1).max()
        for name in COEFFICIENTS
    }
    assert off["polar_express"] < 0.01 and off["jordan"] > 0.1


def test_zero_and_tiny_gradients_are_safe():
    assert not np.asarray(orthogonalized(jnp.zeros((3, 4)), iterations("jordan", 5))).any()
    x = jnp.asarray(with_singular_values(jax.random.key(2), 4, 6, np.ones(4)))
    tiny, plain = (orthogonalized(scale * x, iterations("jordan", 5)) for scale in (1e-12, 1.0))
    np.testing.assert_allclose(tiny, plain, atol=1e-5)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", sorted(SCALES))
def test_three_steps_are_the_formula_in_float64(nesterov, scale):
    rng = np.random.default_rng(0)
    grads = [rng.standard_normal((6, 10)).astype(np.float32) for _ in range(3)]
    tx = scale_by_muon(nesterov=nesterov, scale=scale, momentum=0.9, dtype="float32")
    state, m = tx.init({"w": grads[0]}), np.zeros((6, 10))
    factor = {"width": np.sqrt(10 / 6), "rms": 0.2 * np.sqrt(10), "spectral": np.sqrt(10 / 6), "none": 1.0}[scale]
    for g in grads:
        updates, state = jax.jit(tx.update)({"w": jnp.asarray(g)}, state)
        m = 0.9 * m + 0.1 * g
        u = 0.9 * m + 0.1 * g if nesterov else m
        np.testing.assert_allclose(updates["w"], factor * numpy_newton_schulz(u), rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(state["momentum"]["w"], m, rtol=1e-5, atol=1e-7)


def test_scales_know_inputs_from_outputs():
    wide, tall = SCALES["width"](4, 16), SCALES["width"](16, 4)
    assert (wide, tall) == (2.0, 1.0)
    assert SCALES["spectral"](16, 4) == 0.5 and SCALES["rms"](16, 4) == SCALES["rms"](4, 16) == pytest.approx(0.8)


@pytest.mark.parametrize("at_once", [1, 2, 100, None])
def test_each_matrix_is_treated_as_if_alone_however_they_are_stacked(at_once):
    keys = iter(jax.random.split(jax.random.key(3), 9))
    shapes = {"wide": (4, 10), "tall": (10, 4), "layers": (3, 4, 10), "square": (4, 4), "deep": (2, 3, 10, 4), "last": (4, 10)}
    grads = {name: jax.random.normal(next(keys), shape) for name, shape in shapes.items()}
    updates, _ = run(scale_by_muon(at_once=at_once, dtype="float32"), grads)
    for name, g in grads.items():
        assert updates[name].shape == g.shape
        flat, seen = np.asarray(g).reshape(-1, *g.shape[-2:]), np.asarray(updates[name]).reshape(-1, *g.shape[-2:])
        for x, y in zip(flat, seen, strict=True):
            turned = x.shape[0] > x.shape[1]
            alone = numpy_newton_schulz(x.T).T if turned else numpy_newton_schulz(x)
            np.testing.assert_allclose(y, alone * SCALES["width"](*x.shape), rtol=1e-3, atol=1e-4, err_msg=name)


def test_fused_projections_are_orthogonalized_part_by_part():
    qkv = jax.random.normal(jax.random.key(4), (8, 8 + 4 + 4))
    for parts, cuts in ((4, [4, 8, 12]), ((8, 4, 4), [8, 12])):
        tx = scale_by_muon(layouts={"fused": {"match": "qkv", "parts": parts}}, dtype="float32")
        fused, _ = run(tx, {"qkv": qkv})
        apart, _ = run(scale_by_muon(dtype="float32"), {str(i): x for i, x in enumerate(jnp.split(qkv, cuts, axis=1))})
        np.testing.assert_allclose(fused["qkv"], jnp.concatenate(list(apart.values()), 1), rtol=1e-4, atol=1e-5)


def test_a_convolution_is_one_matrix_from_all_its_inputs():
    kernel = jax.random.normal(jax.random.key(5), (3, 3, 2, 8))
    as_matrix, _ = run(scale_by_muon(dtype="float32"), {"conv": kernel.reshape(18, 8)})
    updates, _ = run(scale_by_muon(layouts={"conv": {"match": "conv", "inputs": 3}}, dtype="float32"), {"conv": kernel})
    np.testing.assert_array_equal(updates["conv"].reshape(18, 8), as_matrix["conv"])


def test_agrees_with_optax_without_nesterov_and_at_the_first_step_with_it():
    keys = jax.random.split(jax.random.key(6), 3)
    grads = {
        str(i): jax.random.normal(key, shape) for i, (key, shape) in enumerate(zip(keys, [(6, 9), (9, 6), (6, 6)], strict=True))
    }
    for nesterov, steps in ((False, 4), (True, 1)):
        ours_tx, theirs_tx = scale_by_muon(nesterov=nesterov, dtype="float32"), optax_muon(1.0, nesterov=nesterov)
        ours_state, theirs_state = ours_tx.init(grads), theirs_tx.init(grads)
        for i in range(steps):
            g = jax.tree.map(lambda x, i=i: x + 0.3 * i, grads)
            ours, ours_state = jax.jit(ours_tx.update)(g, ours_state)
            theirs, theirs_state = jax.jit(theirs_tx.update)(g, theirs_state, grads)
            for name in grads:
                np.testing.assert_allclose(ours[name], -theirs[name], rtol=1e-3, atol=1e-4)


def test_momentum_is_shaped_as_params_and_float32_or_wider():
    params = {"half": jnp.ones((4, 6), jnp.bfloat16), "full": jnp.ones((2, 4, 6))}
    tx = scale_by_muon()
    state = tx.init(params)
    updates, after = tx.update(params, state)
    for tree in (state["momentum"], after["momentum"]):
        assert jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree) == {
            "half": ((4, 6), "float32"),
            "full": ((2, 4, 6), "float32"),
        }
    assert updates["half"].shape == (4, 6)


@pytest.mark.parametrize(
    "options, params, message",
    [
        (
            {"coefficients": "jordon"},
            {"w": (4, 4)},
            "optimizer.coefficients='jordon' is unknown; .*; nearest: 'jordan'",
        ),
        ({"steps": 0}, {"w": (4, 4)}, "optimizer.steps=0: Newton-Schulz takes at least 1"),
        ({"scale": "rmz"}, {"w": (4, 4)}, "optimizer.scale='rmz' is unknown"),
        ({"dtype": "float16"}, {"w": (4, 4)}, "optimizer.dtype='float16' is unknown"),
        ({}, {"b": (4,)}, r"muon: b \(4,\) is no matrix of 1 input axes"),
        (
            {"layouts": {"a": {"match": "w", "parts": 3}}},
            {"w": (4, 4)},
            r"w \(4, 4\): 4 outputs do not divide into 3 parts",
        ),
        ({"layouts": {"a": {"match": "w", "parts": (3, 2)}}}, {"w": (4, 4)}, r"parts \(3, 2\) do not add up to 4 outputs"),
        ({"layouts": {"a": {"match": "vw"}}}, {"w": (4, 4)}, "optimizer.layouts.match='vw' matches no matrix"),
        ({"layouts": {"a": {"match": "w", "part": 3}}}, {"w": (4, 4)}, r"optimizer.layouts.a.part is unknown"),
    ],
)
def test_what_cannot_be_orthogonalized_is_refused_in_one_line(options, params, message):
    with pytest.raises(ValueError, match=message) as error:
        scale_by_muon(**options).init({name: jnp.ones(shape) for name, shape in params.items()})
    assert "\n" not in str(error.value)
