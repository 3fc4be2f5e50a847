"""Inputs and targets: images, arrays, and what is measured on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from research.core.names import choose, keywords
from research.core.types import Batches, Evaluation, Task
from research.data import arrays, images, mnist1d
from research.data.errors import about
from research.data.fashion_mnist import fashion_mnist
from research.data.streams import BAD_RECORDS, Source, ordered_batches, subset, train_batches
from research.evals import absolute_error, bootstrap, correct, mean, nll, squared_error
from research.experiment.parts import HeldOut, Parts
from research.experiment.sections import called, only
from research.models import MODELS
from research.tasks import classification, regression


class Split(NamedTuple):
    """Sources of {"inputs", "targets"} to train on and to test on, the shape of one input, and how many classes or outputs."""

    train: Source
    test: Source
    shape: tuple[int, ...]
    outputs: int


def _same_shape(train: np.ndarray, test: np.ndarray, what: str) -> None:
    """ValueError unless the examples of both splits, [n, ...], are of one shape; `what` names those of the test split."""
    if train.shape[1:] != test.shape[1:]:
        raise ValueError(
            f"{what}: an example is {test.shape[1:]}, in the training split {train.shape[1:]}; one shape is wanted"
        )


def _images(train: images.Images, test: images.Images, name: str = "data: test images") -> Split:
    _same_shape(train.x, test.x, name)
    mean, std = images.channel_statistics(train.x)
    sources = (images.image_source(part.x, part.y, mean=mean, std=std) for part in (train, test))
    return Split(*sources, train.x.shape[1:], int(max(train.y.max(), test.y.max())) + 1)


def _fashion_mnist() -> Split:
    parts = fashion_mnist()
    return _images(images.images(*parts["train"]), images.images(*parts["test"]))


def _idx(*, train_images: str, train_labels: str, test_images: str, test_labels: str) -> Split:
    read = images.images_from_idx
    return _images(read(train_images, train_labels), read(test_images, test_labels), f"data.test_images={test_images!r}")


def _npz_images(*, train: str, test: str, image_name: str, label_name: str) -> Split:
    parts = (images.images_from_npz(path, image_name, label_name) for path in (train, test))
    return _images(*parts, f"data.test={test!r}")


def _folders(*, train: str, test: str, channels: int) -> Split:
    parts = [images.images_from_folders(path, channels) for path in (train, test)]
    if parts[0].classes != parts[1].classes:
        raise ValueError(f"classes of {train!r} are {parts[0].classes}, of {test!r} {parts[1].classes}; they must be the same")
    return _images(*parts, f"data.test={test!r}")


def _mnist1d(*, shuffled: bool, seed: int, samples: int = 5000, train: float = 0.8, label_noise: float = 0.0) -> Split:
    parts = mnist1d.mnist1d_sources(samples=samples, train=train, shuffled=shuffled, label_noise=label_noise, seed=seed)
    return Split(parts["train"], parts["test"], (mnist1d.LENGTH,), 10)


def _numbers(array: np.ndarray, name: str) -> np.ndarray:
    """float32 [n, outputs] of numbers [n] or [n, outputs]."""
    if array.ndim not in (1, 2):
        raise ValueError(f"{name}: numbers [n] or [n, outputs] are wanted, given {array.dtype} {array.shape}")
    numbers = arrays.floats(array, name)
    return numbers[:, None] if numbers.ndim == 1 else numbers


def _npz(as_targets: Callable[[np.ndarray, str], np.ndarray], *, train: str, test: str, inputs: str, targets: str) -> Split:
    """Inputs become float32 as they are, not scaled; targets what `as_targets` makes of them: [n], else [n, outputs]."""

    def read(key: str, path: str) -> tuple[Source, np.ndarray, np.ndarray]:
        held = arrays.read_npz(path, (inputs, targets))
        with about(f"data.{key}={path!r}"):
            x = arrays.floats(held[inputs], f"data.inputs={inputs!r}")
            y = as_targets(held[targets], f"data.targets={targets!r}")
            return arrays.array_source({"inputs": x, "targets": y}), x, y

    (first, x, y), (second, u, v) = read("train", train), read("test", test)
    _same_shape(x, u, f"data.test={test!r}: data.inputs={inputs!r}")
    _same_shape(y, v, f"data.test={test!r}: data.targets={targets!r}")
    return Split(first, second, x.shape[1:], y.shape[1] if y.ndim == 2 else int(max(y.max(), v.max())) + 1)


SPLITS: Mapping[str, Mapping[str, Callable[..., Split]]] = {
    "classification": {
        "fashion_mnist": _fashion_mnist,
        "idx": _idx,
        "npz_images": _npz_images,
        "class_folders": _folders,
        "mnist1d": _mnist1d,
        "npz": partial(_npz, arrays.class_labels),
    },
    "regression": {"npz": partial(_npz, _numbers)},
}
TASKS: Mapping[str, Callable[..., Task]] = {"classification": classification, "regression": regression}
MEASURES: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "classification": {"accuracy": correct(), "nll": nll},
    "regression": {"mse": squared_error, "mae": absolute_error},
}
# Of these, what is chosen by on held-out examples: the smaller the better.
CHOSEN_BY: Mapping[str, str] = {"classification": "nll", "regression": "mse"}


def supervised(config: Any) -> Parts:
    """The model of `config.model` on the inputs and targets of `config.data`.

    config.stream: {batch, validation, bad_records}: examples a step; how many of the training examples are held out, a number,
        0 for none; what becomes of one that is not finite or cannot be read, "raise" or "skip" (data.streams).
    config.evaluate: {every, batch}. "val" is measured every `every` steps and at the end, "test" once, at the
        end, with its 95% interval over examples (`evals.bootstrap`).
    """
    only(config.stream, ("batch", "validation", "bad_records"), "stream")
    only(config.evaluate, ("every", "batch"), "evaluate")
    split = called(SPLITS[config.task.name], config.data, "data")
    model = called(MODELS, config.model, "model", **_sizes(MODELS, config, "model", split))
    task = called(TASKS, config.task, "task", model, batch=config.stream.batch, **_sizes(TASKS, config, "task", split))
    train, held_out = split.train, None
    if config.stream.validation:
        kept, out = arrays.split_rows(len(train), config.stream.validation, seed=0)
        train, held_out = subset(train, kept), subset(train, out)

    bad = {"bad_records": choose({name: name for name in BAD_RECORDS}, config.stream.bad_records, "stream.bad_records")}
    predict, measures = task.methods["predict"].apply, MEASURES[config.task.name]
    batch = config.evaluate.batch
    validation = (
        {}
        if held_out is None
        else {"val": Evaluation(mean(predict, measures), ordered_batches(held_out, batch, **bad), config.evaluate.every)}
    )
    test = Evaluation(bootstrap(predict, measures), ordered_batches(split.test, batch, **bad), 0)

    def endless(source: Source) -> Batches:
        return train_batches(source, config.stream.batch, seed=config.seed, remainder="drop", **bad)

    chosen_by = measures[CHOSEN_BY[config.task.name]]
    return Parts(
        task,
        endless(train),
        {**validation, "test": test},
        {"examples": config.stream.batch},
        show=[f"val/{name}" for name in measures],
        held_out=HeldOut(endless(held_out), chosen_by) if held_out and len(held_out) >= config.stream.batch else None,
    )


def _sizes(table: Mapping[str, Callable[..., Any]], config: Any, where: str, split: Split) -> dict[str, Any]:
    """The sizes that the data set: those of "shape" and "outputs" that the member of `table` in section `where` takes.

    Raises ValueError where the section gives others; more classes than there are in the data may be given.
    """
    section = config[where]
    taken = keywords(choose(table, section.name, f"{where}.name"))[0]
    sizes = {name: size for name, size in {"shape": split.shape, "outputs": split.outputs}.items() if name in taken}
    for name, size in sizes.items():
        given = section.get(name, size)
        spare = config.task.name == "classification" and name == "outputs" and isinstance(given, int) and given > size
        if not spare and not np.array_equal(given, size):
            raise ValueError(f"{where}.{name}={given!r} is not that of the data, {size}; leave it out")
    return sizes
