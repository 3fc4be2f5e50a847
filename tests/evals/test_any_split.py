"""One property of every evaluator: values are those of the examples, however these are batched, ordered and padded."""

from __future__ import annotations

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.evals import (
    absolute_error,
    accuracy,
    auc,
    bits_per_byte,
    bootstrap,
    collect,
    confusion_matrix,
    correct,
    mean,
    mean_of_loss,
    nll,
)
from research.evals._example import linear_classifier

ROWS, FEATURES, CLASSES = 21, 3, 4
TASK = linear_classifier(ROWS, FEATURES, CLASSES)
APPLY = TASK.methods["predict"].apply
VARIABLES = TASK.init(jax.random.key(1))
KEY = jax.random.key(0)
rng = np.random.default_rng(0)
DATA = {
    "inputs": rng.standard_normal((ROWS, FEATURES)).astype(np.float32),
    "targets": rng.integers(0, CLASSES, ROWS).astype(np.int32),
    "mask": rng.uniform(0.5, 2, ROWS).astype(np.float32),
}


def distance(outputs, batch):
    return absolute_error(outputs, {"targets": batch["inputs"] @ jnp.ones((FEATURES, CLASSES))})


EVALUATORS = {
    "mean": mean(APPLY, {"nll": nll, "distance": distance}),
    "mean_of_loss": mean_of_loss(TASK),
    "accuracy": accuracy(APPLY, top=2),
    "bits_per_byte": bits_per_byte(APPLY, bytes_per_token=[1, 2, 3, 0.5]),
    "confusion_matrix": confusion_matrix(APPLY, CLASSES),
    "auc": auc(APPLY, CLASSES, bits=12),
    "bootstrap": bootstrap(APPLY, {"nll": nll, "accuracy": correct()}, resamples=50),
    "collect": collect({"a": accuracy(APPLY), "b": bits_per_byte(APPLY)}, prefix=True),
}


@functools.cache
def compiled(name):
    return jax.jit(EVALUATORS[name].update)


def values(name, batches):
    stats = jax.tree.map(jnp.asarray, EVALUATORS[name].init())
    for i, batch in enumerate(batches):
        stats = compiled(name)(stats, VARIABLES, batch, jax.random.fold_in(KEY, i))  # as evaluate gives them
    return EVALUATORS[name].finalize(jax.device_get(stats))


@functools.cache
def whole(name):
    return values(name, [DATA])


@st.composite
def layouts(draw):
    """Batches of one size that hold every row once, in any order, the rest padding of mask 0 that may be anything, even NaN."""
    size = draw(st.sampled_from([1, 4, 16]))
    slots = -(-ROWS // size) * size + size * draw(st.integers(0, 2))
    places = draw(st.permutations(range(slots)))[:ROWS]
    junk = draw(st.sampled_from([0.0, 1e30, np.nan, -np.inf]))
    laid = {
        "inputs": np.full((slots, FEATURES), junk, np.float32),
        "targets": np.zeros(slots, np.int32),
        "mask": np.zeros(slots, np.float32),
    }
    for name, rows in DATA.items():
        laid[name][list(places)] = rows
    return [{k: x[i : i + size] for k, x in laid.items()} for i in range(0, slots, size)]


@pytest.mark.parametrize("name", sorted(EVALUATORS))
@hypothesis.given(batches=layouts())
def test_values_do_not_depend_on_batches_order_or_padding(name, batches):
    found = values(name, batches)
    assert found.keys() == whole(name).keys()
    for k, expected in whole(name).items():
        np.testing.assert_allclose(found[k], expected, rtol=1e-6, atol=1e-7, err_msg=k)


@pytest.mark.parametrize("name", sorted(EVALUATORS))
def test_nothing_counted_is_nan_not_a_number_nor_an_error(name):
    for batches in ([], [{**DATA, "mask": np.zeros(ROWS, np.float32)}]):
        found = values(name, batches)
        counts = found.pop("confusion_matrix", np.zeros(1))
        assert not counts.any() and all(np.isnan(x).all() for x in found.values()), found


@pytest.mark.parametrize("name", sorted(EVALUATORS))
def test_values_are_floats_or_numpy_on_the_host(name):
    assert all(type(x) is float or isinstance(x, np.ndarray) for x in whole(name).values())


@pytest.mark.parametrize("name", sorted(set(EVALUATORS)))
def test_a_batch_without_a_key_is_named(name):
    batch = {k: x for k, x in DATA.items() if k != "mask"}
    error = KeyError if name == "mean_of_loss" else ValueError  # there it is the task's own
    with pytest.raises(error, match="mask"):
        EVALUATORS[name].update(EVALUATORS[name].init(), VARIABLES, batch, KEY)
