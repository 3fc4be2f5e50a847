"""Classification and regression: masked means, metrics, shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.contracts import check_task
from research.core.types import Spec
from research.models import cnn, mlp
from research.tasks import classification, regression

KEY = jax.random.key(0)


def linear(outputs):
    return mlp(
        shape=[3], outputs=outputs, hidden=[], activation="relu", residual=False, dropout=0.0, init="normal", dtype="float32"
    )


def inputs(batch=6, seed=0):
    return jax.random.normal(jax.random.key(seed), (batch, 3))


MASK = jnp.array([1.0, 0.0, 1.0, 0.5, 1.0, 0.0])


def test_classification_is_the_masked_mean_of_cross_entropy():
    task = classification(linear(4), batch=6, shape=[3], label_smoothing=0.0)
    check_task(task)
    variables = task.init(KEY)
    batch = {"inputs": inputs(), "targets": jnp.array([0, 1, 2, 3, 0, 1]), "mask": MASK}
    loss, aux = task.loss(variables, batch, KEY)
    logits = task.methods["predict"].apply(variables, {"inputs": batch["inputs"]}, KEY)
    nll = -np.asarray(jax.nn.log_softmax(logits))[np.arange(6), batch["targets"]]
    np.testing.assert_allclose(loss, (nll * MASK).sum() / 3.5, rtol=1e-5)
    np.testing.assert_allclose(aux.weight, 3.5)
    np.testing.assert_allclose(aux.metrics["nll"], ((nll * MASK).sum(), 3.5), rtol=1e-5)
    hits = np.asarray(jnp.argmax(logits, -1) == batch["targets"])
    np.testing.assert_allclose(aux.metrics["accuracy"], ((hits * MASK).sum(), 3.5))


def test_label_smoothing_changes_the_loss_and_not_the_measured_nll():
    batch = {"inputs": inputs(), "targets": jnp.array([0, 1, 2, 3, 0, 1]), "mask": MASK}
    plain, smooth = (classification(linear(4), batch=6, shape=[3], label_smoothing=s) for s in (0.0, 0.1))
    variables = plain.init(KEY)
    (loss, aux), (loss_smooth, aux_smooth) = (t.loss(variables, batch, KEY) for t in (plain, smooth))
    assert float(loss) != float(loss_smooth)
    np.testing.assert_allclose(aux.metrics["nll"], aux_smooth.metrics["nll"], rtol=1e-6)


def test_regression_is_the_masked_mean_of_the_squared_error():
    task = regression(linear(2), batch=6, shape=[3], outputs=2)
    check_task(task)
    variables = task.init(KEY)
    targets = jax.random.normal(jax.random.key(1), (6, 2))
    loss, aux = task.loss(variables, {"inputs": inputs(), "targets": targets, "mask": MASK}, KEY)
    predicted = task.methods["predict"].apply(variables, {"inputs": inputs()}, KEY)
    squared = np.square(predicted - targets).mean(-1)
    np.testing.assert_allclose(loss, (squared * MASK).sum() / 3.5, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["mse"][0], (squared * MASK).sum(), rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["mae"][0], (np.abs(predicted - targets).mean(-1) * MASK).sum(), rtol=1e-5)


@pytest.mark.parametrize("task", [classification(linear(4), batch=6, shape=[3], label_smoothing=0.1),
                                  regression(linear(2), batch=6, shape=[3], outputs=2)])  # fmt: skip
def test_a_batch_that_is_masked_altogether_has_loss_zero_and_gradients_zero(task):
    targets = task.batch["targets"]
    batch = {"inputs": inputs(), "targets": jnp.ones(targets.shape, targets.dtype), "mask": jnp.zeros(6)}
    variables = task.init(KEY)
    (loss, aux), grads = jax.value_and_grad(lambda p: task.loss({**variables, "params": p}, batch, KEY), has_aux=True)(
        variables["params"]
    )
    assert float(loss) == 0.0 == float(aux.weight)
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(grads))


def test_predicting_is_in_evaluation_mode_and_training_is_not():
    model = cnn(shape=[4, 4, 1], outputs=3, widths=[4], blocks=1, normalization="batch", residual=False, dropout=0.5,
                dtype="float32", convolution="patches")  # fmt: skip
    task = classification(model, batch=6, shape=[4, 4, 1], label_smoothing=0.0)
    check_task(task)
    variables = task.init(KEY)
    x = jax.random.normal(KEY, (6, 4, 4, 1))
    batch = {"inputs": x, "targets": jnp.zeros(6, jnp.int32), "mask": jnp.ones(6)}
    loss = jax.jit(task.loss)
    (one, aux), (two, _) = loss(variables, batch, jax.random.key(1)), loss(variables, batch, jax.random.key(2))
    assert float(one) != float(two)  # dropout
    assert not np.array_equal(jax.tree.leaves(aux.state)[0], jax.tree.leaves(variables["state"])[0])
    predict = jax.jit(task.methods["predict"].apply)
    first, second = predict(variables, {"inputs": x}, jax.random.key(1)), predict(variables, {"inputs": x}, jax.random.key(2))
    np.testing.assert_array_equal(first, second)


def test_specs_name_the_batch_axis_and_methods_hold_no_labels():
    task = classification(linear(4), batch=6, shape=[3], label_smoothing=0.0)
    assert task.batch["inputs"] == Spec((6, 3), jnp.float32, ("batch", None))
    assert all(set(m.inputs) == {"inputs"} for m in task.methods.values())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch": 0}, "task.batch=0 must be at least 1"),
        ({"label_smoothing": 1.0}, "task.label_smoothing=1.0 must be at least 0 and below 1"),
    ],
)
def test_what_cannot_be_is_refused_by_key(change, message):
    with pytest.raises(ValueError, match=message):
        classification(linear(4), **{"batch": 6, "shape": [3], "label_smoothing": 0.0} | change)
