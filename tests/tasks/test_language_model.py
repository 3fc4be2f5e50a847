"""Language models: the loss a token, and sampling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.contracts import check_task
from research.models import transformer
from research.nn.losses import cross_entropy
from research.tasks import generate, language_model
from research.tasks.generate import context_of, drawn, empty_cache

KEY = jax.random.key(0)
MODEL = {
    "vocab": 7, "context": 12, "width": 8, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 0,
    "attention": {"mask": ["window(3, 0)", "full()"], "implementation": ""},
    "rope_base": 1e4, "qk_norm": 1.0, "mlp": "gelu", "mlp_width": 12, "norm": "rms", "conv": 2, "dropout": 0.0, "ngrams": [2],
    "ngram_bits": 4, "ngram_width": 4, "induction": [1], "copy": True, "tie_embeddings": False, "embed_scale": 1.0,
    "embed_norm": False, "zero_init": False, "dtype": "float32", "scan_layers": False, "remat": ["none"],
}  # fmt: skip


@functools.cache
def task_of(label_smoothing=0.0, z_loss=0.0, mask=("window(3, 0)", "full()"), induction=(1,)):
    attention = {"mask": mask, "implementation": ""}
    model = transformer(**MODEL | {"attention": attention, "induction": induction, "copy": bool(induction)})
    return language_model(model, batch=3, length=8, label_smoothing=label_smoothing, z_loss=z_loss)


def batch():
    tokens = jax.random.randint(jax.random.key(1), (3, 9), 0, 7)
    mask = jnp.ones((3, 8)).at[0, :3].set(0.0).at[2].set(0.0)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask}


def test_the_loss_is_the_masked_mean_of_nats_a_token():
    task = task_of()
    check_task(task)
    variables, given = task.init(KEY), batch()
    loss, aux = jax.jit(task.loss)(variables, given, KEY)
    logits = jax.jit(task.methods["predict"].apply)(variables, {"inputs": given["inputs"]}, KEY)
    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(given["targets"])[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss, (nll * given["mask"]).sum() / 13, rtol=1e-5)
    assert float(aux.weight) == 13.0
    np.testing.assert_allclose(aux.metrics["nll"], ((nll * given["mask"]).sum(), 13), rtol=1e-5)
    hits = np.asarray(jnp.argmax(logits, -1) == given["targets"])
    np.testing.assert_allclose(aux.metrics["accuracy"][0], (hits * given["mask"]).sum())


def test_smoothing_and_z_loss_are_in_the_loss_and_not_in_the_metric():
    variables, given = task_of().init(KEY), batch()
    _, plain = jax.jit(task_of().loss)(variables, given, KEY)
    loss, aux = jax.jit(task_of(label_smoothing=0.1, z_loss=0.01).loss)(variables, given, KEY)
    logits = jax.jit(task_of().methods["predict"].apply)(variables, {"inputs": given["inputs"]}, KEY)
    expected, _ = cross_entropy(logits, given["targets"], label_smoothing=0.1, z_loss=0.01)
    np.testing.assert_allclose(loss, (expected * given["mask"]).sum() / 13, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["nll"], plain.metrics["nll"], rtol=1e-6)


def test_embed_gives_what_the_output_layer_reads():
    task = task_of(induction=())
    variables, given = task.init(KEY), {"inputs": batch()["inputs"]}
    hidden = jax.jit(task.methods["embed"].apply)(variables, given, KEY)
    logits = jax.jit(task.methods["predict"].apply)(variables, given, KEY)
    np.testing.assert_allclose(hidden @ variables["params"]["head"]["kernel"], logits, atol=1e-5)


def test_a_length_beyond_the_context_is_refused():
    with pytest.raises(ValueError, match=r"^task.length=13 exceeds model.context=12$"):
        language_model(transformer(**MODEL), batch=3, length=13, label_smoothing=0.0, z_loss=0.0)


def greedy(task, variables, prompt, tokens):
    """The likeliest token again and again, each time reading everything from the beginning."""
    predict = jax.jit(task.methods["predict"].apply)
    given = np.asarray(prompt)
    for _ in range(tokens):
        padded = np.zeros((given.shape[0], 12), np.int32)
        padded[:, : given.shape[1]] = given
        logits = predict(variables, {"inputs": jnp.asarray(padded)}, KEY)[:, given.shape[1] - 1]
        given = np.concatenate([given, np.asarray(jnp.argmax(logits, -1))[:, None].astype(np.int32)], axis=1)
    return given[:, prompt.shape[1] :]


def test_greedy_text_equals_reading_from_the_beginning_up_to_the_last_position():
    task = task_of()
    variables = jax.tree.map(lambda x: 2 * x, task.init(KEY))
    prompt = jnp.array([[1, 2, 3], [3, 4, 5]])
    text = generate(task.methods["decode"], variables, prompt, KEY, tokens=10, temperature=0.0, top_k=0)
    assert text.shape == (2, 10) and text.dtype == jnp.int32
    np.testing.assert_array_equal(text, greedy(task, variables, prompt, 10))
    assert len(np.unique(text)) > 2


def test_sampling_draws_from_the_key_and_each_row_by_itself():
    task, prompt = task_of(), jnp.ones((4, 2), jnp.int32)
    variables = task.init(KEY)

    def text(key):
        return generate(task.methods["decode"], variables, prompt, key, tokens=9, temperature=1.0, top_k=0)

    one = text(jax.random.key(1))
    np.testing.assert_array_equal(one, text(jax.random.key(1)))
    assert not np.array_equal(one, text(jax.random.key(2)))
    assert len({tuple(row) for row in np.asarray(one).tolist()}) == 4


def test_generation_stays_within_the_context():
    task = task_of()
    variables = task.init(KEY)
    assert context_of(task.methods["decode"]) == 12
    with pytest.raises(
        ValueError, match=r"^generate: 3 tokens of prompt \+ 11 to come .* exceed the context of 12 .*; at most 10 "
    ):
        generate(task.methods["decode"], variables, jnp.ones((1, 3), jnp.int32), KEY, tokens=11, temperature=0.0, top_k=0)


def test_a_model_of_sliding_windows_alone_has_no_limit():
    task = task_of(mask=("window(3, 0)",), induction=())
    assert context_of(task.methods["decode"]) is None
    text = generate(
        task.methods["decode"], task.init(KEY), jnp.ones((1, 3), jnp.int32), KEY, tokens=30, temperature=0.0, top_k=0
    )
    assert text.shape == (1, 30)


@pytest.mark.parametrize(
    "options, message", [({"tokens": 0}, "both must be at least 1"), ({"temperature": -1.0}, "must not be negative")]
)
def test_impossible_sampling_is_refused(options, message):
    task = task_of()
    with pytest.raises(ValueError, match=message):
        generate(
            task.methods["decode"],
            {},
            jnp.ones((1, 3), jnp.int32),
            KEY,
            **{"tokens": 2, "temperature": 1.0, "top_k": 0} | options,
        )


def test_drawing_follows_the_distribution_its_temperature_and_its_top_k():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    many = jnp.tile(logits, (20000, 1))

    def share(temperature, top_k):
        return np.bincount(np.asarray(drawn(many, KEY, temperature, top_k)), minlength=3) / 20000

    np.testing.assert_allclose(share(1.0, 0), [0.5, 0.3, 0.2], atol=0.015)
    np.testing.assert_allclose(share(0.5, 0), np.array([25, 9, 4]) / 38, atol=0.015)
    np.testing.assert_allclose(share(1.0, 2), [0.625, 0.375, 0.0], atol=0.015)
    np.testing.assert_array_equal(share(0.0, 0), [1.0, 0.0, 0.0])
    np.testing.assert_allclose(share(1.0, 100), [0.5, 0.3, 0.2], atol=0.015)


def test_an_empty_cache_is_zeros_for_any_number_of_rows():
    decode = task_of().methods["decode"]
    cache = empty_cache(decode, 5)
    assert jax.tree.structure(cache) == jax.tree.structure(decode.inputs["cache"])
    assert all(x.shape[0] == 5 and not x.any() for x in jax.tree.leaves(cache))
