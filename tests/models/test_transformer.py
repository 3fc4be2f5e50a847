"""The transformer: decoding equals reading, scanned layers equal written-out ones, and what cannot be built is refused."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.nonfinite import first_nonfinite
from research.models import transformer
from research.nn import stack

VALUES = 2e-5
KEY = jax.random.key(0)
SLIDING, SINKING, GLOBAL = "window(3, 0)", "window(3, 0) | global_tokens(2)", "full()"
BASE = {
    "vocab": 5, "context": 12, "width": 8, "layers": 2, "heads": 4, "kv_heads": 4, "head_dim": 0, "rope_base": 1e4,
    "qk_norm": 0.0, "mlp": "squared_relu", "mlp_width": 12, "norm": "rms", "conv": 0, "dropout": 0.0, "ngrams": [],
    "ngram_bits": 4, "ngram_width": 4, "induction": [], "copy": False, "tie_embeddings": False, "embed_scale": 1.0,
    "embed_norm": False, "zero_init": False, "dtype": "float32", "scan_layers": False, "remat": ["none"],
}  # fmt: skip


def attention(*mask, implementation=""):
    return {"mask": mask, "implementation": implementation}


@functools.cache
def built(mask, implementation, options):
    return transformer(**BASE | {"attention": attention(*mask, implementation=implementation)} | dict(options))


def model(*, mask=(GLOBAL,), implementation="", **options):
    return built(mask, implementation, tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in options.items())))


def tokens(batch=2, length=12):
    return jax.random.randint(jax.random.key(1), (batch, length), 0, 5)


def decoded(f, variables, given, sizes, compiled=True):
    """Logits of `given`, read in pieces of `sizes` through the cache."""

    def decode(*args):
        return f.apply(*args, method="decode")[0]

    decode = jax.jit(decode) if compiled else decode
    specs = f.ask("cache_specs", given.shape[0])
    cache, at, out = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), specs), 0, []
    for size in sizes:
        logits, cache = decode(variables, given[:, at : at + size], cache, jnp.int32(at))
        out.append(logits)
        at += size
    assert at == given.shape[1]
    return jnp.concatenate(out, axis=1)


CHOICES = ([0.0, 1e4], [1, 4], [(GLOBAL,), (SLIDING,), (SLIDING, GLOBAL), (SINKING, GLOBAL)], [0.0, 2.0])


def combinations():
    """Half of the combinations, which have all pairs of choices; four of them in `make test` already."""
    for places in itertools.product(*map(range, map(len, CHOICES))):
        chosen = [of[i] for of, i in zip(CHOICES, places)]
        if sum(places) % 2 == 0:
            yield pytest.param(*chosen, marks=pytest.mark.slow if sum(places) % 4 or places[2] % 2 else ())


@pytest.mark.parametrize("rope_base, kv_heads, mask, qk_norm", list(combinations()))
def test_decoding_in_pieces_equals_reading_at_once(rope_base, kv_heads, mask, qk_norm):
    f = model(rope_base=rope_base, kv_heads=kv_heads, mask=mask, qk_norm=qk_norm)
    variables = f.init(KEY)
    given = tokens()
    whole = f.apply(variables, given)[0]
    # not compiled: all these models share their operations
    got = decoded(
        f, variables, given, (6, 6), compiled=False
    )  # the second piece overwrites part of a rolling cache that it still reads
    np.testing.assert_allclose(got, whole, atol=VALUES)


@pytest.mark.parametrize(
    "options",
    [
        {"mask": (SLIDING, GLOBAL), "conv": 3, "ngrams": [2, 3], "induction": [1, 2], "copy": True, "embed_norm": True,
         "qk_norm": 3.0},
        pytest.param(
            {"mask": (SLIDING, SINKING), "scan_layers": True, "layers": 4, "kv_heads": 2, "tie_embeddings": True,
             "norm": "layer"}, marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_decoding_token_by_token_equals_reading_at_once_with_everything_on(options):
    f = model(**options)
    variables = f.init(KEY)
    given = tokens()
    whole = jax.jit(lambda v, x: f.apply(v, x)[0])(variables, given)
    np.testing.assert_allclose(decoded(f, variables, given, (5, *[1] * 7)), whole, atol=VALUES)


def test_a_rolling_cache_is_as_long_as_the_window_and_a_full_one_as_the_context():
    f = model(mask=(SLIDING, GLOBAL))
    specs = f.ask("cache_specs", 3)["blocks"]
    assert specs["0"]["attention"]["key"].shape == (3, 4, 4, 2)
    assert specs["1"]["attention"]["key"].shape == (3, 12, 4, 2)
    assert specs["0"]["attention"]["key"].axes == ("batch", "window", "kv_heads", "head_dim")
    assert specs["1"]["attention"]["key"].axes == ("batch", "context", "kv_heads", "head_dim")


@pytest.mark.parametrize("mask, implementation", [((SLIDING, GLOBAL), "reference"), ((SLIDING, GLOBAL), ""), ((SINKING,), "")])
def test_a_token_changes_no_logits_before_it(mask, implementation):
    f = model(mask=mask, implementation=implementation, conv=3, ngrams=[2], induction=[1], copy=True)
    variables = f.init(KEY)
    read = jax.jit(lambda v, x: f.apply(v, x)[0])
    given = tokens()
    changed = given.at[:, 7].set((given[:, 7] + 1) % 5)
    before, after = read(variables, given), read(variables, changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert not np.allclose(before[:, 7], after[:, 7])


def test_scanned_layers_are_the_same_function_as_written_out_ones():
    written, scanned = (model(mask=(SLIDING, GLOBAL), layers=4, scan_layers=scan, mlp="swiglu") for scan in (False, True))
    variables = written.init(KEY)
    params = variables["params"]
    converted = {**variables, "params": {**params, "blocks": stack.stack_layers(params["blocks"], 2)}}
    assert jax.tree.structure(converted) == jax.tree.structure(scanned.init(KEY))
    given = tokens()

    def both(f, variables):
        def loss(params):
            return jnp.mean(jnp.square(f.apply({**variables, "params": params}, given)[0]))

        return jax.jit(jax.value_and_grad(loss))(variables["params"])

    value, grads = both(written, variables)
    value_scanned, grads_scanned = both(scanned, converted)
    np.testing.assert_allclose(value_scanned, value, rtol=1e-5)
    grads = {**grads, "blocks": stack.stack_layers(grads["blocks"], 2)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads_scanned, grads)


SCANNED = pytest.param({"scan_layers": True, "layers": 4}, id="scanned", marks=pytest.mark.slow)


@pytest.mark.parametrize("options", [pytest.param({}, id="written out"), SCANNED])
@pytest.mark.slow
def test_a_step_of_gradient_descent_is_differentiated(options):
    """Reverse over reverse: of MAML, and of hypergradients."""

    def slopes(implementation):
        f = model(mask=(SLIDING, SINKING), implementation=implementation, **options)
        variables = f.init(KEY)

        def loss(params, given):
            return jnp.mean(jnp.square(f.apply({**variables, "params": params}, given)[0]))

        def after_a_step(params):
            slope = jax.grad(loss)(params, tokens())
            return loss(jax.tree.map(lambda p, g: p - 0.1 * g, params, slope), tokens()[:, ::-1])

        return jax.jit(jax.grad(after_a_step))(variables["params"])

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), slopes(""), slopes("reference"))


def test_in_bfloat16_it_is_near_the_reference_in_float32():
    exact = model(implementation="reference")
    variables = exact.init(KEY)
    low = model(dtype="bfloat16")
    a, b = (f.apply(variables, tokens())[0] for f in (exact, low))
    assert b.dtype == jnp.float32
    assert 1e-5 < float(jnp.abs(a - b).max()) < 0.1


def test_zero_init_starts_at_uniform_probabilities_and_tied_tables_have_no_head():
    f = model(zero_init=True)
    np.testing.assert_array_equal(f.apply(f.init(KEY), tokens())[0], np.zeros((2, 12, 5)))
    assert "head" not in model(tie_embeddings=True).init(KEY)["params"]


def test_the_scale_of_queries_begins_where_it_is_told():
    scale = model(qk_norm=3.0).init(KEY)["params"]["blocks"]["0"]["attention"]["query_norm"]["scale"]
    np.testing.assert_array_equal(scale, [3.0, 3.0])


def test_dropout_is_on_in_training_only():
    f = model(dropout=0.5)
    variables = f.init(KEY)
    one, two = (f.apply(variables, tokens(), key=jax.random.key(i), train=True)[0] for i in (1, 2))
    assert not np.array_equal(one, two)
    one, two = (f.apply(variables, tokens(), key=jax.random.key(i))[0] for i in (1, 2))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    "options, says",
    [
        ({}, "jvp(blocks/1)/mlp"),
        ({"remat": ["full"]}, "blocks/1)/mlp"),
        ({"scan_layers": True}, "iteration 1: square, blocks/0/mlp"),
    ],
    ids=["written out", "recomputed", "scanned"],
)
def test_a_value_that_is_not_finite_is_told_by_its_layer(options, says):
    f = model(**options)
    variables = f.init(KEY)

    def loss(params):
        logits, _ = f.apply({**variables, "params": params}, tokens(), key=KEY)
        return logits.sum()

    params = variables["params"]
    if options.get("scan_layers"):
        kernel = params["blocks"]["0"]["mlp"]["up"]["kernel"]
        params["blocks"]["0"]["mlp"]["up"]["kernel"] = kernel.at[1].multiply(1e30)
    else:
        params["blocks"]["1"]["mlp"]["up"]["kernel"] *= 1e30
    assert says in (first_nonfinite(jax.grad(loss), params) or "nothing")


def test_every_parameter_names_its_axes():
    f = model(mask=(SLIDING, GLOBAL), conv=3, qk_norm=1.0, mlp="swiglu", ngrams=[2], induction=[1], copy=True, norm="layer")
    shapes = jax.eval_shape(f.init, KEY)["params"]
    jax.tree.map(lambda x, axes: None if len(axes) == x.ndim else pytest.fail(str((x, axes))), shapes, f.axes["params"])
    block = f.axes["params"]["blocks"]["0"]
    assert block["attention"]["query"]["kernel"] == jax.P("embed", "heads")
    assert block["attention"]["key"]["kernel"] == jax.P("embed", "kv_heads")
    assert block["mlp"]["down"]["kernel"] == jax.P("mlp", "embed")
    assert f.axes["params"]["head"]["kernel"] == jax.P("embed", "vocab")


IMPOSSIBLE = [
    ({"width": 100, "heads": 3, "kv_heads": 3}, "model.width=100 is not divisible by model.heads=3; nearest: 99 or 102"),
    ({"kv_heads": 3}, "model.heads=4 is not divisible by model.kv_heads=3; nearest: 3 or 6"),
    ({"kv_heads": 0}, "model.kv_heads=0 must be at least 1"),
    ({"width": 12}, "model.head_dim=3 is odd, and rotary embedding (model.rope_base=10000.0) turns pairs; nearest: 2 or 4"),
    (
        {"attention": attention(GLOBAL, SLIDING, SLIDING)},
        "model.layers=2 is not divisible by the number of masks in model.atten",
    ),
    ({"attention": attention("windo(3, 0)")}, "model.attention.mask[0]='windo(3, 0)': windo is unknown; allowed: bigbird, "),
    ({"attention": attention()}, "model.attention.mask=[] must have an expression or more"),
    ({"attention": attention("per_head(full())")}, "model.attention.mask[0]='per_head(full())': it is of 1 heads; allowed: "),
    ({"layers": 0}, "model.layers=0 must be at least 1"),
    ({"dropout": 1.0}, "model.dropout=1.0 must be at least 0 and below 1"),
    ({"mlp": "swigelu"}, "model.mlp='swigelu' is unknown; allowed: gelu, relu, silu, squared_relu, swiglu; nearest: 'swiglu'"),
    ({"norm": "rmsnorm"}, "model.norm='rmsnorm' is unknown; allowed: layer, plain_rms, rms"),
    ({"dtype": "bfloat"}, "model.dtype='bfloat' is unknown; allowed: bfloat16, float32; nearest: 'bfloat16'"),
    ({"attention": "flash"}, "model.attention='flash' is no section; allowed: mask, implementation, as in "),
    (
        {"attention": attention(GLOBAL, implementation="flash")},
        "model.attention.implementation='flash' is unknown; allowed: gpu, ",
    ),
    ({"conv": -1}, "model.conv=-1 must be 0 (none) or the number of taps"),
    ({"copy": True}, "model.copy=True copies what model.induction finds"),
    ({"ngrams": [2], "ngram_bits": 40}, "model.ngram_bits=40 must be at least 1 and at most 24"),
    ({"ngrams": [0]}, "model.ngrams and model.induction: each=0 must be at least 1"),
]


@pytest.mark.parametrize("options, message", IMPOSSIBLE)
def test_what_cannot_be_built_is_refused_in_one_line_by_key(options, message):
    with pytest.raises(ValueError) as error:
        transformer(**BASE | {"attention": attention(GLOBAL)} | options)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_less_of_a_layer_is_kept_the_less_memory_a_step_takes():
    given = tokens(4, 256)

    def memory(remat):
        f = model(layers=8, scan_layers=True, remat=remat, context=256, width=64, mlp_width=256)
        variables = f.init(KEY)
        step = jax.grad(lambda params: jnp.sum(f.apply({**variables, "params": params}, given)[0] ** 2))
        return jax.jit(step).lower(variables["params"]).compile().memory_analysis().temp_size_in_bytes

    none, half, weights, full = (memory(remat) for remat in (["none"], ["none", "full"], ["weights"], ["full"]))
    assert full < 0.5 * weights and weights < 0.75 * none and full < half < none


@pytest.mark.parametrize(
    "remat, said",
    [
        (["ful"], r"model.remat='ful' is unknown; allowed: .*; nearest: 'full'"),
        ([], r"model.remat=\[\] must have a name"),
        (["none", "full", "none"], "model.layers=2 must be a multiple of 3, after which"),
    ],
)
def test_what_a_layer_keeps_is_one_of_the_names(remat, said):
    with pytest.raises(ValueError, match=said):
        model(remat=remat)
