"""Classification and regression on a user's own files: they set the sizes, and what cannot be is refused at build."""

from __future__ import annotations

import numpy as np
import pytest

from configs.base import base
from research.core import contracts
from research.experiment import build, run
from tests.data.test_images import idx

X = np.random.RandomState(0).rand(24, 3)
CLASSES = np.arange(24) % 3
PICTURES = np.random.RandomState(0).randint(0, 256, (24, 4, 5)).astype(np.uint8)


def saved(folder, part, **arrays):
    np.savez(folder / f"{part}.npz", **arrays)
    return str(folder / f"{part}.npz")


def config(task, data, **model):
    linear = {
        "name": "mlp",
        "hidden": [],
        "activation": "relu",
        "residual": False,
        "dropout": 0.0,
        "init": "normal",
        "dtype": "float32",
    }
    config = base()
    config.task = task
    config.data = data
    config.model = linear | model
    config.stream = {"batch": 8, "validation": 0, "bad_records": "raise"}
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 0.01,
        "weight_decay": 0.0,
        "clip": 0.0,
        "schedule": {"name": "constant", "warmup": 0},
    }
    config.evaluate = {"every": 0, "batch": 10}
    config.train.steps = 2
    return config


def built(folder, task, train, test=None, given=None, **model):
    """The experiment of arrays {"x", "y"} to train on and to test on, with more keys of the task and of the model."""
    files = {part: saved(folder, part, **arrays) for part, arrays in (("train", train), ("test", test or train))}
    options = {"classification": {"label_smoothing": 0.0}, "regression": {}}[task]
    data = {"name": "npz", **files, "inputs": "x", "targets": "y"}
    return build(config({"name": task, **options, **(given or {})}, data, **model))


@pytest.mark.parametrize(
    "task, x, y, outputs",
    [
        ("classification", X, CLASSES, 3),
        ("classification", PICTURES, CLASSES.astype(np.uint8)[:, None], 3),
        ("classification", X.astype(np.float16), CLASSES > 0, 2),
        ("regression", X, X[:, 0], 1),
        ("regression", X > 0.5, X[:, :2], 2),
        ("regression", CLASSES, CLASSES * 100, 1),  # integers are numbers here, not the indices of 201 classes
    ],
    ids=["int64", "uint8 [n, 1] of uint8 images", "bool of float16", "float [n]", "float [n, 2] of bool", "int64 of int64 [n]"],
)
def test_ordinary_dtypes_and_shapes_are_read_and_the_targets_set_the_outputs(task, x, y, outputs, tmp_path):
    experiment = built(tmp_path, task, {"x": x, "y": y})
    stage = experiment.stages[0]
    batch = next(stage.batches.open())
    contracts.check_batch(batch, stage.learner.batch, stage.batches.fingerprint)
    assert batch["inputs"].dtype == np.float32 and batch["inputs"].shape == (8, *x.shape[1:])
    everything = next(experiment.evaluations["test"].batches.open())
    np.testing.assert_allclose(everything["inputs"], x[:10].astype(np.float32))
    np.testing.assert_allclose(everything["targets"].ravel(), y[:10].ravel().astype(np.float32))
    outcome = run(experiment)
    head = stage.learner.variables(outcome.state)["params"]["head"]
    assert head["bias"].shape == (outputs,)
    predicted = x.reshape(24, -1).astype(np.float32) @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    if task == "regression":
        wanted = {"test/mse": np.square(predicted - y.reshape(24, -1)).mean()}
    else:
        wanted = {"test/accuracy": (predicted.argmax(1) == y.ravel()).mean()}
    for name, value in wanted.items():
        np.testing.assert_allclose(outcome.results[name], value, rtol=1e-3)


FLOATS, NAN = {"x": X, "y": X[:, 0]}, X + np.where(np.arange(3) == 2, np.nan, 0)
REFUSED = {
    "labels below 0": ("classification", {"x": X, "y": CLASSES - 1}, None, ["data.targets='y'", "-1 to 1", "allowed 0 to"]),
    "labels below 0 to test on": (
        "classification",
        {"x": X, "y": CLASSES},
        {"x": X, "y": CLASSES - 1},
        ["data.test=", "-1 to 1"],
    ),
    "labels that are floats": (
        "classification",
        {"x": X, "y": CLASSES / 1.0},
        None,
        ["data.train=", "train.npz': data.targets='y': integers [n] or [n, 1]", "float64 (24,)"],
    ),
    "one-hot labels": ("classification", {"x": X, "y": np.eye(3, dtype=int)[CLASSES]}, None, ["integers [n]", "int64 (24, 3)"]),
    "targets of three axes": (
        "regression",
        {"x": X, "y": X[:, None]},
        None,
        ["train.npz': data.targets='y': numbers [n] or [n, outputs]", "float64 (24, 1, 3)"],
    ),
    "targets that are text": ("regression", {"x": X, "y": CLASSES.astype(str)}, None, ["data.targets='y': numbers", "<U"]),
    "inputs that are complex": (
        "regression",
        {**FLOATS, "x": X * 1j},
        None,
        ["data.inputs='x': numbers", "complex128 (24, 3)"],
    ),
    "inputs that are not finite": (
        "regression",
        {**FLOATS, "x": NAN},
        None,
        ["data.inputs='x': 24 of 72 numbers are not finite"],
    ),
    "inputs past float32": ("regression", {**FLOATS, "x": X * 1e300}, None, ["train.npz': data.inputs='x'", "float32"]),
    "unequal lengths": ("regression", {**FLOATS, "x": X[:9]}, None, ["train.npz': arrays of one length", "inputs (9, 3)"]),
    "no examples": (
        "classification",
        {"x": X[:0], "y": CLASSES[:0]},
        None,
        ["train.npz': arrays inputs, targets hold no records"],
    ),
    "no examples of numbers": ("regression", {"x": X[:0], "y": X[:0]}, None, ["train.npz'", "hold no records"]),
    "other inputs to test on": (
        "regression",
        FLOATS,
        {**FLOATS, "x": X[:, :2]},
        ["test.npz': data.inputs='x'", "(2,)", "(3,)"],
    ),
    "other targets to test on": ("regression", FLOATS, {**FLOATS, "y": X}, ["test.npz': data.targets='y'", "(3,)", "(1,)"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arrays_that_cannot_be_are_one_line_with_key_and_file(case, tmp_path):
    task, train, test, fragments = REFUSED[case]
    refused(lambda: built(tmp_path, task, train, test), ["data.", *fragments])


def refused(make, fragments):
    with pytest.raises(ValueError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    for fragment in fragments:
        assert fragment in message


def idx_files(folder, train, test):
    files = {"train_images": train, "test_images": test, "train_labels": CLASSES, "test_labels": CLASSES}
    for name, array in files.items():
        (folder / name).write_bytes(idx(array))
    return {"name": "idx", **{name: str(folder / name) for name in files}}


def npz_images(folder, train, test):
    files = {part: saved(folder, part, x=x, y=CLASSES) for part, x in (("train", train), ("test", test))}
    return {"name": "npz_images", **files, "image_name": "x", "label_name": "y"}


def class_folders(folder, train, test):
    image = pytest.importorskip("PIL.Image")
    for part, x in (("train", train), ("test", test)):
        for name in ("cat", "dog"):
            (folder / part / name).mkdir(parents=True)
            image.fromarray(x[0]).save(folder / part / name / "a.png")
    return {"name": "class_folders", "train": str(folder / "train"), "test": str(folder / "test"), "channels": 1}


@pytest.mark.parametrize("made, key", [(idx_files, "test_images"), (npz_images, "test"), (class_folders, "test")])
def test_test_images_of_another_size_are_refused_by_key_and_file(made, key, tmp_path):
    data = made(tmp_path, PICTURES, PICTURES.transpose(0, 2, 1))
    make = {"name": "classification", "label_smoothing": 0.0}
    refused(lambda: build(config(make, data)), [f"data.{key}={data[key]!r}: ", "(5, 4, 1)", "(4, 5, 1)"])


def test_test_images_of_other_channels_are_refused(tmp_path):
    data = npz_images(tmp_path, np.stack([PICTURES] * 3, -1), PICTURES)
    make = {"name": "classification", "label_smoothing": 0.0}
    refused(lambda: build(config(make, data)), ["data.test=", "(4, 5, 1)", "(4, 5, 3)"])


def test_labels_are_no_numbers_to_predict(tmp_path):
    data = idx_files(tmp_path, PICTURES, PICTURES)
    refused(lambda: build(config({"name": "regression"}, data)), ["data.name='idx' is unknown; allowed: npz"])


@pytest.mark.parametrize(
    "task, y, more, says",
    [
        ("regression", X, {"given": {"outputs": 3}, "outputs": 3}, None),
        ("regression", X, {"given": {"outputs": 2}}, "task.outputs=2 is not that of the data, 3"),
        ("regression", X, {"outputs": 4}, "model.outputs=4 is not that of the data, 3"),
        ("classification", CLASSES, {"outputs": 4}, None),  # a class may have no example
        ("classification", CLASSES, {"outputs": 2}, "model.outputs=2 is not that of the data, 3"),
        ("classification", CLASSES, {"shape": [3]}, None),
        ("classification", CLASSES, {"shape": [4]}, "model.shape=[4] is not that of the data, (3,)"),
    ],
)
def test_sizes_that_the_data_have_may_be_given_but_not_otherwise(task, y, more, says, tmp_path):
    if says is None:
        assert built(tmp_path, task, {"x": X, "y": y}, **more).stages
    else:
        refused(lambda: built(tmp_path, task, {"x": X, "y": y}, **more), [says])
