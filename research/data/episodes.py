"""Few-shot learning: classes with their examples, and N-way K-shot episodes of them as batches.

An episode is drawn from its own number and the seed alone: classes, then `shots` examples of each for the support and `queries`
others for the query; classes are numbered 0 to ways - 1 anew in each. So a position is one number, a batch can be cut by rows,
and what the i-th episode holds does not depend on how many are in a batch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from research.core.batches import from_function
from research.core.types import Batch, Batches
from research.data.determinism import digest, mixed
from research.data.errors import no_such_file, reason
from research.data.images import IMAGE_ENDINGS, PIL_MODES

VERSION = 1  # raised when the same arguments begin to give other episodes


class Classes(NamedTuple):
    """x: [n, ...] examples. rows: for each class the rows of x that are of it. names: of the classes, where they have any."""

    x: np.ndarray
    rows: tuple[np.ndarray, ...]
    names: tuple[str, ...] = ()


def classes_of(x: np.ndarray, y: np.ndarray, among: Sequence[int] | None = None) -> Classes:
    """Classes of examples x [n, ...] with labels y [n]; of those in `among` only, in that order.

    Raises ValueError: x and y of unequal length, a label in `among` that no example has.
    """
    if len(x) != len(y) or y.ndim != 1:
        raise ValueError(f"classes: x {x.shape} and y {y.shape}; one label an example is wanted")
    labels = np.unique(y).tolist()
    missing = sorted(set(among or ()) - set(labels))
    if missing:
        raise ValueError(f"classes: no example of {', '.join(map(str, missing))}; there are {', '.join(map(str, labels))}")
    chosen = labels if among is None else list(among)
    return Classes(x, tuple(np.flatnonzero(y == label) for label in chosen), tuple(map(str, chosen)))


def classes_from_folders(folder: str, *, size: int, channels: int = 1, ink: bool = False) -> Classes:
    """Classes of images in folders: every folder below `folder`, at any depth, that holds images (.png, .jpg, .jpeg) is a
    class, as in Omniglot's images_background/<alphabet>/<character>/ and in mini-ImageNet's <split>/<class>/.

    Args:
      size: images become uint8 [size, size, channels]; each pixel is the mean of those it covers.
      channels: 1 grey, 3 colour.
      ink: black on white becomes 255 on 0, as `glyphs` are.

    Raises ValueError (one line): no such folder, no images in it, an image that cannot be read.
    """
    top = os.path.expanduser(folder)
    if channels not in PIL_MODES:
        raise ValueError(f"channels: given {channels}, allowed {', '.join(map(str, PIL_MODES))}")
    if size < 1:
        raise ValueError(f"size: given {size}, allowed 1 and more")
    if not os.path.isdir(top):
        raise ValueError(f"class folders: {no_such_file(folder)}")
    images: list[np.ndarray] = []
    labels: list[int] = []
    names: list[str] = []
    for place, folders, files in os.walk(top):
        folders.sort()
        pictures = sorted(file for file in files if file.lower().endswith(IMAGE_ENDINGS))
        if pictures:
            images += [_picture(os.path.join(place, file), size, channels) for file in pictures]
            labels += [len(names)] * len(pictures)
            names.append(os.path.relpath(place, top).replace(os.sep, "/"))
    if not names:
        raise ValueError(f"class folders: {folder!r} holds no images; <class>/<image>.png is wanted, at any depth")
    x = np.stack(images)
    return classes_of(255 - x if ink else x, np.asarray(labels))._replace(names=tuple(names))


def _picture(file: str, size: int, channels: int) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(file) as image:
            small = image.convert(PIL_MODES[channels]).resize((size, size), Image.Resampling.BOX)
    except Exception as error:  # PIL raises plain Exceptions too, as for an image that is too large
        raise ValueError(f"image {file!r} cannot be read: {reason(error)}") from None
    return np.asarray(small).reshape(size, size, channels)


def episodes(
    classes: Classes,
    batch: int,
    *,
    ways: int,
    shots: int,
    queries: int,
    seed: int,
    scale: float = 1 / 255,
    length: int | None = None,
) -> Batches:
    """Batches of `batch` episodes: {"support", "query"} of {"inputs": float32 [batch, ways * k, ...], "targets": int32
    [batch, ways * k], "mask": ones float32 [batch, ways * k]}, with k = `shots` in the support and `queries` in the query, one
    class after another; what `over_tasks(maml(task), batch)` and its like take.

    Args:
      batch: episodes a batch. Rows are episodes, so several processes make each its own.
      ways: classes an episode, drawn without replacement. shots, queries: examples of each, none in both.
      seed: any int; episodes of different seeds have nothing in common.
      scale: inputs are examples times this; of uint8 images 1 / 255 gives 0 to 1.
      length: how many episodes in all, a multiple of `batch`; endless where None.

    Raises ValueError (one line): a number below 1, more ways than classes, a class with too few examples, a length that is no
    multiple.
    """
    for name, number in {"batch": batch, "ways": ways, "shots": shots, "queries": queries}.items():
        if number < 1:
            raise ValueError(f"episodes: {name}={number}; allowed: 1 or more")
    if ways > len(classes.rows):
        raise ValueError(f"episodes: ways={ways}; allowed: at most {len(classes.rows)}, the number of classes")
    least = min(range(len(classes.rows)), key=lambda c: len(classes.rows[c]))
    if len(classes.rows[least]) < shots + queries:
        name = classes.names[least] if classes.names else least
        raise ValueError(
            f"episodes: shots={shots} and queries={queries}; allowed: together at most {len(classes.rows[least])}, as many as "
            f"class {name!r} has"
        )
    if length is not None and (length < 1 or length % batch):
        raise ValueError(f"episodes: length={length} is no multiple of batch={batch}")
    total = None if length is None else length // batch
    sizes = f"batch={batch} ways={ways} shots={shots} queries={queries} seed={seed} scale={scale} length={length}"
    name = f"episodes v{VERSION} {sizes} classes=({digest(classes.x, *classes.rows)})"

    def rows_of(number: int) -> np.ndarray:
        """Rows of x of the episode of that number, int64 [ways, shots + queries]: of the support, then of the query."""
        bits = np.random.Philox(key=mixed(VERSION, seed, number))  # whose raw output NumPy keeps for ever
        chosen = np.argsort(bits.random_raw(len(classes.rows)), kind="stable")[:ways]
        orders = (np.argsort(bits.random_raw(len(classes.rows[c])), kind="stable")[: shots + queries] for c in chosen)
        return np.stack([classes.rows[c][order] for c, order in zip(chosen, orders)])

    def part(rows: np.ndarray) -> Batch:
        tasks, _, each = rows.shape
        targets = np.tile(np.repeat(np.arange(ways, dtype=np.int32), each), (tasks, 1))
        inputs = classes.x[rows.reshape(tasks, -1)] * np.float32(scale)
        return {"inputs": inputs, "targets": targets, "mask": np.ones(targets.shape, np.float32)}

    def cut(start: int, stop: int) -> Batches:
        if not 0 <= start < stop <= batch:
            raise ValueError(f"rows: given {start} to {stop}, allowed: some of 0 to {batch}")

        def at(index: int) -> Batch:
            drawn = np.stack([rows_of(index * batch + i) for i in range(start, stop)])
            return {"support": part(drawn[..., :shots]), "query": part(drawn[..., shots:])}

        return from_function(at, total, name)._replace(rows=cut)

    return cut(0, batch)
