"""Classes to draw few-shot episodes of, in three parts that share none: {"train", "validation", "test"}."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import matplotlib
import numpy as np

from research.data import glyphs as letters_of_scripts
from research.data.episodes import Classes, classes_from_folders, classes_of
from research.data.fashion_mnist import fashion_mnist
from research.data.glyphs import DRAWERS, Glyphs, part_of
from research.data.images import images_from_idx

Parts = dict[str, Classes]
PARTS = ("train", "validation", "test")
# Of Fashion-MNIST's ten kinds: T-shirt, dress, coat, sandal and sneaker; trouser, pullover, shirt, bag and boot.
FASHION = {"train": (0, 3, 4, 5, 7), "validation": (1, 2, 6, 8, 9), "test": (1, 2, 6, 8, 9)}


def _classes(held: Glyphs) -> Classes:
    images = held.images.reshape(-1, *held.images.shape[2:], 1)
    names = tuple(f"{script} {character}" for script, character in zip(held.scripts, held.characters))
    return classes_of(images, np.repeat(np.arange(len(held.images)), DRAWERS))._replace(names=names)


def glyphs() -> Parts:
    """Letters of scripts rendered from the Noto fonts; each part has scripts of its own. Raises ValueError as `data.glyphs`."""
    held = letters_of_scripts.glyphs()
    return {name: _classes(held.part(name)) for name in PARTS}


def letters() -> Parts:
    """Latin and Greek letters of the fonts that come with matplotlib, in all parts the same: for trying things out anywhere."""
    folder = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    files = [os.path.join(folder, f"DejaVu{face}.ttf") for face in ("Sans", "Serif")]
    classes = _classes(letters_of_scripts.rendered({"Latin": files, "Greek": files}))
    return dict.fromkeys(PARTS, classes)


def fashion() -> Parts:
    """Fashion-MNIST: five kinds of clothing to learn from, five others for the test, of its training and its test images.
    There are too few for a third part: validation has the kinds of the test, on the training images."""
    held = fashion_mnist()
    return {name: classes_of(*held["test" if name == "test" else "train"], FASHION[name]) for name in PARTS}


def idx(*, train_images: str, train_labels: str, test_images: str, test_labels: str) -> Parts:
    """Digits, or whatever else comes as MNIST's four IDX files do, gzipped or not: every second label to learn from, by its
    number, the others for the test, of the training and the test files. Validation has the labels of the test, on the training
    images.

    Raises ValueError: fewer than two labels, a label of the test part that the test files lack, or as `images_from_idx`.
    """
    train, test = images_from_idx(train_images, train_labels), images_from_idx(test_images, test_labels)
    labels = np.unique(train.y).tolist()
    if len(labels) < 2:
        raise ValueError(f"data.train_labels={train_labels!r}: {len(labels)} labels; two are wanted at least")
    shown, held_out = labels[::2], labels[1::2]
    return {
        "train": classes_of(train.x, train.y, shown),
        "validation": classes_of(train.x, train.y, held_out),
        "test": classes_of(test.x, test.y, held_out),
    }


def omniglot(*, path: str) -> Parts:
    """Omniglot (Lake et al. 2015) in `path`, as published: images_background/<alphabet>/<character>/*.png, whose alphabets are
    parted by name into training and validation, and images_evaluation/, the test. 28 x 28, ink 255.

    Raises ValueError as `classes_from_folders`.
    """
    background, evaluation = (
        classes_from_folders(os.path.join(path, f"images_{name}"), size=28, ink=True) for name in ("background", "evaluation")
    )
    alphabets = sorted({name.split("/")[0] for name in background.names})
    chosen = {alphabet for alphabet in alphabets if part_of(alphabet) == "validation"} or {alphabets[-1]}
    held_out = [name.split("/")[0] in chosen for name in background.names]
    parts = {"train": [not out for out in held_out], "validation": held_out}
    return {**{name: _chosen(background, keep) for name, keep in parts.items()}, "test": evaluation}


def mini_imagenet(*, path: str, size: int = 84) -> Parts:
    """mini-ImageNet (Vinyals et al. 2016) in `path`: train/<class>/, val/<class>/ and test/<class>/ with images, made
    size x size in colour. Raises ValueError as `classes_from_folders`."""
    folders = {"train": "train", "validation": "val", "test": "test"}
    return {name: classes_from_folders(os.path.join(path, folder), size=size, channels=3) for name, folder in folders.items()}


def _chosen(classes: Classes, keep: list[bool]) -> Classes:
    rows = tuple(rows for rows, kept in zip(classes.rows, keep) if kept)
    return classes._replace(rows=rows, names=tuple(name for name, kept in zip(classes.names, keep) if kept))


SOURCES: Mapping[str, Callable[..., Parts]] = {
    "glyphs": glyphs,
    "letters": letters,
    "fashion_mnist": fashion,
    "idx": idx,
    "omniglot": omniglot,
    "mini_imagenet": mini_imagenet,
}
