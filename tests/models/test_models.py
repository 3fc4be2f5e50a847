"""Whole networks: sizes, published parameter counts, what is refused, and many members at once."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.names import call_checked
from research.models import MODELS, cnn, gru, mlp, mnist1d, series_cnn, vit
from research.models.cnn import halved
from research.models.mnist1d import PARAMETERS

KEY = jax.random.key(0)
MLP = {"shape": [3, 2], "outputs": 4, "hidden": [5, 5], "activation": "tanh", "residual": False, "dropout": 0.0,
       "init": "normal", "dtype": "float32"}  # fmt: skip
CNN = {"shape": [9, 9, 2], "outputs": 3, "widths": [4, 6], "blocks": 2, "normalization": "batch", "residual": True,
       "dropout": 0.0, "dtype": "float32", "convolution": "lax"}  # fmt: skip
VIT = {"shape": [8, 4, 1], "outputs": 3, "patch": 4, "width": 8, "layers": 2, "heads": 2, "qk_norm": 1.0, "mlp": "gelu",
       "mlp_width": 16, "norm": "layer", "dropout": 0.0, "zero_init": False, "dtype": "float32",
       "attention": {"mask": ["full()"], "implementation": ""}, "scan_layers": False, "remat": ["none"]}  # fmt: skip
GRU = {"shape": [6, 2], "outputs": 3, "hidden": 4, "layers": 2, "bidirectional": True, "readout": "last", "init": "uniform",
       "dtype": "float32", "unroll": 3}  # fmt: skip
SERIES = {"shape": [40], "outputs": 10, "widths": [4, 5], "windows": [5, 3], "stride": 2, "padding": 1, "init": "uniform",
          "dtype": "float32", "convolution": "lax"}  # fmt: skip


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def run(f, variables, x, **options):
    return jax.jit(lambda v, x: f.apply(v, x, **options))(variables, x)


def parameters(f):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(f.init, KEY)["params"]))


@pytest.mark.parametrize("name", MODELS)
def test_a_config_must_name_every_option(name):
    for parameter in inspect.signature(MODELS[name]).parameters.values():
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.default is inspect.Parameter.empty
    with pytest.raises(ValueError, match=r"^model lacks model\.\w+"):
        call_checked(MODELS[name], {}, "model")


@pytest.mark.parametrize("kind", PARAMETERS)
def test_the_paper_models_have_the_published_numbers_of_parameters(kind):
    f = mnist1d(kind=kind, shape=[40], outputs=10)
    assert parameters(f) == PARAMETERS[kind] == {"linear": 410, "mlp": 15210, "cnn": 5210, "gru": 5134}[kind]


@pytest.mark.parametrize("kind", ["mlp", "gru", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("linear", "cnn"))])
def test_many_seeds_at_once_equal_one_by_one(kind):
    f = mnist1d(kind=kind, shape=[40], outputs=10)
    keys, x = jax.random.split(KEY, 3), normal(5, 40)
    stacked = jax.jit(jax.vmap(f.init))(keys)
    many = jax.jit(jax.vmap(lambda v: f.apply(v, x)[0]))(stacked)
    for i in range(3):
        one, _ = run(f, jax.tree.map(lambda v, i=i: v[i], stacked), x)
        np.testing.assert_allclose(many[i], one, atol=1e-5)


def test_the_paper_mlp_adds_its_second_layer_to_its_first():
    f = mnist1d(kind="mlp", shape=[40], outputs=10)
    variables, x = f.init(KEY), normal(5, 40)
    p = variables["params"]
    h = jax.nn.relu(x @ p["layers"]["0"]["kernel"] + p["layers"]["0"]["bias"][None])
    h = h + jax.nn.relu(h @ p["layers"]["1"]["kernel"] + p["layers"]["1"]["bias"][None])
    np.testing.assert_allclose(run(f, variables, x)[0], h @ p["head"]["kernel"] + p["head"]["bias"][None], atol=1e-5)


def test_residual_connections_begin_at_the_second_layer():
    f = mlp(**MLP | {"shape": [5], "residual": True})
    variables, x = f.init(KEY), normal(2, 5)
    first, second = (variables["params"]["layers"][i] for i in "01")
    h = jnp.tanh(x @ first["kernel"] + first["bias"][None])
    h = h + jnp.tanh(h @ second["kernel"] + second["bias"][None])
    np.testing.assert_allclose(run(f, variables, x, method="hidden")[0], h, atol=1e-5)


def test_the_paper_models_start_as_pytorch_starts_them():
    p = mnist1d(kind="linear", shape=[40], outputs=10).init(KEY)["params"]["head"]
    for x in (p["kernel"], p["bias"]):
        assert 0.12 < float(jnp.abs(x).max()) <= 40**-0.5 == pytest.approx(0.158, abs=1e-3)


def test_an_mlp_without_hidden_layers_is_linear():
    f = mlp(**MLP | {"hidden": []})
    variables = f.init(KEY)
    p, x = variables["params"]["head"], normal(5, 3, 2)
    np.testing.assert_allclose(run(f, variables, x)[0], x.reshape(5, 6) @ p["kernel"] + p["bias"][None], atol=1e-5)
    assert set(variables["params"]) == {"head", "layers"} or set(variables["params"]) == {"head"}


@pytest.mark.parametrize("make, options, inputs", [(mlp, MLP, (3, 2)), (cnn, CNN, (9, 9, 2)), (vit, VIT, (8, 4, 1)),
                                                   (gru, GRU, (6, 2)), (series_cnn, SERIES, (40,))])  # fmt: skip
def test_outputs_and_what_the_output_layer_reads(make, options, inputs):
    f = make(**options)
    variables, x = f.init(KEY), normal(5, *inputs)
    out, hidden = jax.jit(lambda v, x: (f.apply(v, x)[0], f.apply(v, x, method="hidden")[0]))(variables, x)
    assert out.shape == (5, options["outputs"]) and hidden.ndim == 2
    head = variables["params"]["head"]
    np.testing.assert_allclose(out, hidden @ head["kernel"] + head["bias"][None], atol=1e-5)
    assert bool(jnp.isfinite(out).all()) and float(out.std()) > 1e-3


def test_batch_norm_keeps_running_statistics_in_state_and_uses_them_in_evaluation():
    f = cnn(**CNN)
    variables, x = f.init(KEY), normal(16, 9, 9, 2) * 3
    trained, state = run(f, variables, x, train=True)
    assert any(
        not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(variables["state"]), strict=True)
    )
    evaluated, same = run(f, variables, x)
    jax.tree.map(np.testing.assert_array_equal, same, variables["state"])
    assert not np.allclose(trained, evaluated)
    alone = run(f, variables, x[:1])[0]
    np.testing.assert_allclose(alone, evaluated[:1], atol=1e-5)  # no example sees another


def test_group_norm_needs_no_state_and_both_convolutions_agree():
    lax, patches = (cnn(**CNN | {"normalization": "group", "convolution": c}) for c in ("lax", "patches"))
    variables, x = lax.init(KEY), normal(2, 9, 9, 2)
    assert not variables["state"]
    np.testing.assert_allclose(run(lax, variables, x)[0], run(patches, variables, x)[0], atol=2e-5)


def test_halving_takes_the_maximum_of_every_square():
    x = jnp.arange(15.0).reshape(1, 3, 5, 1)
    np.testing.assert_array_equal(halved(x)[0, :, :, 0], [[6.0, 8.0]])


def test_a_gru_reads_the_last_state_of_each_direction():
    both, forward = gru(**GRU | {"layers": 1}), gru(**GRU | {"layers": 1, "bidirectional": False})
    variables, x = both.init(KEY), normal(2, 6, 2)
    hidden = run(both, variables, x, method="hidden")[0]
    changed = run(both, variables, x.at[:, 0].set(0.0), method="hidden")[0]
    assert hidden.shape == (2, 8)
    assert not np.allclose(hidden[:, 4:], changed[:, 4:])  # the first input is the last one that going back reads
    assert run(forward, forward.init(KEY), x, method="hidden")[0].shape == (2, 4)


def test_vit_sees_where_a_patch_is_and_every_patch_sees_every_other():
    f = vit(**VIT)
    variables, x = f.init(KEY), normal(1, 8, 4, 1)
    swapped = jnp.concatenate([x[:, 4:], x[:, :4]], axis=1)
    assert not np.allclose(run(f, variables, x)[0], run(f, variables, swapped)[0])
    no_position = {**variables, "params": {**variables["params"], "position": jnp.zeros((2, 8))}}
    np.testing.assert_allclose(run(f, no_position, x)[0], run(f, no_position, swapped)[0], atol=1e-5)


REFUSED = [
    (cnn, CNN, {"shape": [9, 9]}, "cnn reads inputs of shape [height, width, channels], not [9, 9]"),
    (cnn, CNN, {"widths": [4] * 5}, "model.widths=[4, 4, 4, 4, 4] halves 9 x 9 inputs away; at most 4"),
    (cnn, CNN, {"widths": []}, "model.widths=[] must name"),
    (cnn, CNN, {"normalization": "batchnorm"}, "model.normalization='batchnorm' is unknown; allowed: batch, group, none"),
    (cnn, CNN, {"normalization": "group", "widths": [20]}, "model.widths: each=20 is not divisible by a group"),
    (cnn, CNN, {"convolution": "fft"}, "model.convolution='fft' is unknown; allowed: lax, patches"),
    (vit, VIT, {"patch": 3}, "each side of the image=8 is not divisible by model.patch=3; nearest: 6 or 9"),
    (vit, VIT, {"attention": "dense"}, "model.attention='dense' is no section; allowed: mask, implementation, as in "),
    (vit, VIT, {"heads": 3}, "model.width=8 is not divisible by model.heads=3; nearest: 6 or 9"),
    (mlp, MLP, {"activation": "sigmoidd"}, "model.activation='sigmoidd' is unknown; allowed: gelu, relu"),
    (mlp, MLP, {"hidden": [0]}, "model.hidden and model.shape: each=0 must be at least 1"),
    (mlp, MLP, {"init": "torch"}, "model.init='torch' is unknown; allowed: he_normal, normal, uniform, zeros"),
    (gru, GRU, {"shape": [6, 2, 3]}, "gru reads inputs of shape [length] or [length, features], not [6, 2, 3]"),
    (gru, GRU, {"readout": "lats"}, "model.readout='lats' is unknown; allowed: all, last; nearest: 'last'"),
    (series_cnn, SERIES, {"windows": [5]}, "model.widths=[4, 5] and model.windows=[5] must name one each for every layer"),
    (series_cnn, SERIES, {"shape": [2]}, "model.windows=[5, 3]: 5 does not fit 2 positions + 2 x model.padding=1"),
    (mnist1d, {"shape": [40], "outputs": 10}, {"kind": "rnn"}, "model.kind='rnn' is unknown; allowed: cnn, gru, linear, mlp"),
]


@pytest.mark.parametrize("make, options, change, message", REFUSED)
def test_what_cannot_be_built_is_refused_in_one_line_by_key(make, options, change, message):
    with pytest.raises(ValueError) as error:
        make(**options | change)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
