"""Whole learners on a pipeline: they train as on one device, and what does not fit is told before anything compiles."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict

from research.core.collectives import collectives
from research.core.config import load_config
from research.core.loop import compiled
from research.core.mesh import RULES, Pipeline, constrained, entered, make_layout
from research.core.types import Aux, Spec, Task
from research.dry_run import pipeline_lines
from research.estimates import accumulated, sharpness_aware
from research.experiment import build
from research.learners import gradient, population
from research.models import transformer, vit
from research.nn import stack
from research.nn.functional import functional, param
from research.tasks import classification, language_model

KEY = jax.random.key(0)
SMOKE = "configs/lm/stdlib.py:smoke"
TRANSFORMER = {
    "vocab": 8, "context": 16, "width": 8, "layers": 8, "heads": 4, "kv_heads": 4, "head_dim": 0,
    "attention": {"mask": ["window(7, 0)", "full()"], "implementation": ""}, "rope_base": 1e4, "qk_norm": 1.0, "mlp": "swiglu",
    "mlp_width": 16, "norm": "rms", "conv": 2, "dropout": 0.0, "ngrams": [], "ngram_bits": 4, "ngram_width": 4,
    "induction": [], "copy": False, "tie_embeddings": False, "embed_scale": 1.0, "embed_norm": True, "zero_init": False,
    "dtype": "float32", "scan_layers": True, "remat": ["none"],
}  # fmt: skip


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.kernel = param(jax.random.normal(rngs.params(), (6, 6)) * 0.3, "embed", None)

    def __call__(self, x):
        return constrained(x + jnp.tanh(x @ self.kernel[...]), "batch", "embed")


class Model(nnx.Module):
    def __init__(self, rngs):
        self.blocks = stack.build(lambda kind, r: Layer(r), 8, 1, True, rngs)

    def __call__(self, x):
        return stack.run(self.blocks, lambda block, x, _: (block(x), None), x, scan=True)[0]


def layers():
    """Eight layers, nothing else, that are to turn their inputs round."""
    f = functional(Model)

    def loss(variables, batch, key):
        y, state = f.apply(variables, batch["inputs"], key=key, train=True)
        errors, mask = ((y - batch["inputs"][:, ::-1]) ** 2).mean(-1), batch["mask"]
        return (errors * mask).sum() / mask.sum(), Aux(state, {}, mask.sum())

    specs = {"inputs": Spec((32, 6), jnp.float32, ("batch", None)), "mask": Spec((32,), jnp.float32, ("batch",))}
    inputs = np.asarray(jax.random.normal(jax.random.key(1), (32, 6)))
    batch = {"inputs": inputs, "mask": (np.arange(32) % 5 != 0).astype(np.float32)}
    return Task(f.init, loss, {}, specs, f.axes), batch


def language(**options):
    model = transformer(**TRANSFORMER | options)
    tokens = np.random.default_rng(0).integers(0, 8, (16, 17)).astype(np.int32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": np.ones((16, 16), np.float32)}
    return language_model(model, batch=16, length=16, label_smoothing=0.0, z_loss=0.0), batch


def images():
    model = vit(shape=[4, 4, 1], outputs=3, patch=2, width=8, layers=4, heads=2, dropout=0.0, qk_norm=1.0, mlp="gelu",
                attention={"mask": ["full()"], "implementation": ""}, mlp_width=16, norm="layer", zero_init=False,
                dtype="float32", scan_layers=True, remat=["full"])  # fmt: skip
    draw = np.random.default_rng(0)
    inputs = draw.normal(size=(16, 4, 4, 1)).astype(np.float32)
    batch = {"inputs": inputs, "targets": draw.integers(0, 3, 16).astype(np.int32), "mask": np.ones(16, np.float32)}
    return classification(model, batch=16, shape=[4, 4, 1], label_smoothing=0.0), batch


def trained(learner, batch, layout, steps=3):
    """(losses of some steps, the State after them, the step's optimized HLO)."""
    with entered(layout):
        program = compiled(learner, layout)
        state = program.init(KEY, None)
        held = program.put(jax.tree.map(lambda x: np.stack([x] * steps), batch))
        key = KEY if layout is None else jax.device_put(KEY, layout.replicated)
        step = program.step.lower(state, held, steps, key).compile()
        state, metrics = step(state, held, key)
    total, weight = metrics["loss"]
    return np.asarray(total / weight), state, step.as_text()


def check(learner, batch, sizes, *schedule):
    expected, after, _ = trained(learner, batch, None)
    losses, state, text = trained(learner, batch, make_layout(sizes, RULES, Pipeline(*schedule)))
    assert (expected[0] != expected[-1]).all()
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for got, wanted in zip(jax.tree.leaves(state["params"]), jax.tree.leaves(after["params"]), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-5)
    return state, text


def shares(tree):
    """What part of the bytes of a tree one device holds."""
    leaves = jax.tree.leaves(tree)
    return sum(np.prod(x.sharding.shard_shape(x.shape)) for x in leaves) / sum(x.size for x in leaves)


@pytest.mark.slow
def test_a_population_of_sharpness_aware_learners_accumulates_on_a_pipeline():
    task, batch = layers()
    learner = population(gradient(task, optax.sgd(0.1, momentum=0.9), sharpness_aware(0.05, accumulated(2))), 2)
    state, text = check(learner, batch, {"population": 2, "pipeline": 2, "data": 2}, "gpipe", 4)
    assert shares(state["params"]) == shares(state["opt"]) == 1 / 4
    size = max(x.nbytes for x in jax.tree.leaves(state["params"]))
    assert not [c for c in collectives(text) if c.kind == "all-gather" and c.bytes >= size / 2]


COMPOSED = {
    "exact": lambda task: gradient(task, optax.adam(1e-2)),
    "accumulated": lambda task: gradient(task, optax.adam(1e-2), accumulated(2)),
    "sharpness_aware": lambda task: gradient(task, optax.adam(1e-2), sharpness_aware(0.05)),
    "population": lambda task: population(gradient(task, optax.adam(1e-2)), 4),
    "population by map": lambda task: population(gradient(task, optax.adam(1e-2)), 2, method="map"),
}


@pytest.mark.slow
@pytest.mark.parametrize("composed", COMPOSED)
@pytest.mark.parametrize("schedule", [("gpipe", 8), ("interleaved", 4, 2)])
def test_what_wraps_a_task_wraps_a_pipeline(composed, schedule):
    task, batch = layers()
    check(COMPOSED[composed](task), batch, {"pipeline": 4, "data": 2}, *schedule)


MODELS = [
    (language, {}, {"pipeline": 2, "tensor": 2, "sequence": 2}),
    (language, {}, {"pipeline": 2, "data": 2, "fsdp": 2}),
    (language, {"dtype": "bfloat16"}, {"pipeline": 4, "data": 2}),
    (images, {}, {"pipeline": 4, "data": 2}),
]


@pytest.mark.slow
@pytest.mark.parametrize("made, options, sizes", MODELS)
def test_transformers_on_a_pipeline_with_other_axes(made, options, sizes):
    task, batch = made(**options)
    if options:
        expected, _, _ = trained(gradient(task, optax.sgd(0.1)), batch, None)
        losses, _, _ = trained(gradient(task, optax.sgd(0.1)), batch, make_layout(sizes))
        np.testing.assert_allclose(losses, expected, rtol=1e-3)
    else:
        check(gradient(task, optax.sgd(0.01)), batch, sizes, "gpipe", 4)


SCANNED = {"mesh.pipeline": 2, "model.scan_layers": True}
ACCUMULATED = {"estimate": {"name": "exact", "wrap": ["accumulated"], "accumulated": {"n": 4}}}
REFUSED = [
    ({"mesh.pipeline": 2}, "mesh.pipeline=2 with model.scan_layers=False: layers written out have no stages"),
    ({**SCANNED, "mesh.pipeline": 8}, "model.layers=4 is a stack of 4 .* not divisible by mesh.pipeline=8"),
    ({**SCANNED, "pipeline.schedule": "interleaved", "pipeline.groups": 4}, "by mesh.pipeline=2 x pipeline.groups=4"),
    ({**SCANNED, "pipeline.microbatches": 3}, "pipeline.microbatches=3 does not cut stream.batch=8 .*nearest: 2"),
    ({**SCANNED, "mesh.data": 2, "pipeline.microbatches": 8}, "=8 does not cut stream.batch=8 .* 2 ways; nearest: 4"),
    ({**SCANNED, "evaluate.batch": 6}, "pipeline.microbatches=4 does not cut evaluate.batch=6 .*; nearest: 3"),
    ({**SCANNED, **ACCUMULATED}, "microbatches=4 does not cut stream.batch=8 / estimate.accumulated.n=4 .*; nearest: 2"),
    ({"pipeline.schedule": "gpip"}, "pipeline.schedule='gpip' is unknown; allowed: gpipe, interleaved; nearest: 'gpipe'"),
    ({"mesh.sequence": 4, "evaluate.length": 30}, "evaluate.length=30 is not divisible by mesh.sequence=4"),
    ({"mesh.data": 4, **ACCUMULATED}, "estimate.accumulated.n=4 does not cut stream.batch=8 .* 4 ways; nearest: 2"),
]


@pytest.mark.parametrize("overrides, says", REFUSED)
def test_a_config_that_does_not_fit_is_one_line(overrides, says):
    config = ConfigDict(load_config(SMOKE).to_dict())
    config.update_from_flattened_dict(overrides)
    with pytest.raises(ValueError, match=says) as error:
        build(config)
    assert "\n" not in str(error.value)


def test_a_model_without_stacked_layers_has_nothing_to_cut():
    config = load_config("configs/papers/mnist1d/config.py:smoke", {"mesh.pipeline": "2"})
    with pytest.raises(ValueError, match="mesh.pipeline=2 has nothing to cut: model.name='.*' has no stacked layers"):
        build(config)


def test_microbatches_that_are_smaller_than_the_mesh_are_refused_where_they_are_cut():
    task, batch = layers()
    learner = gradient(task, optax.sgd(0.1), accumulated(16))
    with (
        entered(make_layout({"data": 4})),
        pytest.raises(ValueError, match="accumulated: n=16 .* of 2, .*data=4 .*divisors of 8"),
    ):
        jax.eval_shape(learner.step, jax.eval_shape(learner.init, KEY), batch, KEY)


def test_a_run_says_how_long_its_devices_wait():
    layout = make_layout({"pipeline": 4}, RULES, Pipeline("interleaved", 8, 2))
    says = "pipeline (interleaved): 4 stages, 8 microbatches, 2 groups of layers a device; a device waits 15.8% of a pass"
    assert pipeline_lines(layout)[0].startswith(says)
    assert pipeline_lines(make_layout({"data": 4})) == pipeline_lines(None) == []


EIGHT = [  # beside "pipeline 4, data 2" of tests/distributed/test_meshes.py
    {"mesh.pipeline": "2", "mesh.data": "2", "mesh.tensor": "2"},
    {"mesh.pipeline": "2", "mesh.data": "2", "pipeline.schedule": "interleaved", "pipeline.groups": "2"},
]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mesh", EIGHT)
def test_the_first_losses_of_a_language_model_are_those_of_one_device(mesh):
    from benchmarks.meshes import first_steps

    scanned = {"model.scan_layers": "True"}
    expected = first_steps(tuple(scanned.items())).losses
    assert len(expected) == 20 and expected[-1] < 0.6 * expected[0]
    np.testing.assert_allclose(first_steps(tuple({**scanned, **mesh}.items())).losses, expected, rtol=1e-5)
