"""Models on eight devices compute what they compute on one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core.loop import compiled
from research.core.mesh import entered, make_layout
from research.learners import gradient
from research.models import cnn, transformer
from research.tasks import classification, language_model

KEY = jax.random.key(0)
MODEL = {
    "vocab": 8, "context": 136, "width": 8, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 0,
    "attention": {"mask": ["window(7, 0)", "full()"], "implementation": ""}, "rope_base": 1e4, "qk_norm": 1.0, "mlp": "swiglu",
    "mlp_width": 16, "norm": "rms", "conv": 2, "dropout": 0.0, "ngrams": [2], "ngram_bits": 4, "ngram_width": 4,
    "induction": [2], "copy": True, "tie_embeddings": False, "embed_scale": 1.0, "embed_norm": True, "zero_init": False,
    "dtype": "float32", "scan_layers": False, "remat": ["none"],
}  # fmt: skip
DENSE = {"mask": ["window(7, 0) | global_tokens(2)", "full()"], "implementation": "reference"}


def language(**options):
    task = language_model(transformer(**MODEL | options), batch=8, length=136, label_smoothing=0.0, z_loss=0.0)
    tokens = np.random.default_rng(0).integers(0, 8, (8, 137)).astype(np.int32)
    return task, {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": np.ones((8, 136), np.float32)}


def images():
    model = cnn(shape=[4, 4, 1], outputs=3, widths=[8], blocks=1, normalization="batch", residual=False, dropout=0.0,
                dtype="float32", convolution="lax")  # fmt: skip
    draw = np.random.default_rng(0)
    inputs = draw.normal(size=(8, 4, 4, 1)).astype(np.float32)
    batch = {"inputs": inputs, "targets": draw.integers(0, 3, 8).astype(np.int32), "mask": np.ones(8, np.float32)}
    return classification(model, batch=8, shape=[4, 4, 1], label_smoothing=0.0), batch


def steps(task, batch, layout):
    """Losses of three steps."""
    learner = gradient(task, optax.sgd(0.1))
    with entered(layout):
        program = compiled(learner, layout)
        state = program.init(KEY, None)
        held = program.put(jax.tree.map(lambda x: np.stack([x] * 3), batch))
        _, metrics = program.step(state, held, 3, KEY if layout is None else jax.device_put(KEY, layout.replicated))
    total, weight = metrics["loss"]
    return np.asarray(total / jnp.broadcast_to(weight, total.shape))


def scanned():
    return language(scan_layers=True, ngrams=[], copy=False, attention=DENSE)


@pytest.mark.parametrize("made", [images, *(pytest.param(made, marks=pytest.mark.slow) for made in (language, scanned))])
def test_eight_devices_equal_one(made):
    task, batch = made()
    alone = steps(task, batch, None)
    assert alone[0] != alone[2]
    np.testing.assert_allclose(steps(task, batch, make_layout({"data": 4, "fsdp": 2})), alone, rtol=2e-5)
