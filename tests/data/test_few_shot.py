"""Sources of few-shot classes: three parts, of classes that training does not show."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
from PIL import Image

from research.data.few_shot import FASHION, SOURCES


def saved(folder, shade, mode="L"):
    folder.mkdir(parents=True)
    for i in range(2):
        Image.new(mode, (10, 10), shade).save(folder / f"{i}.png")


def test_omniglot_is_parted_by_alphabet(tmp_path):
    for alphabet in ("Greek", "Hebrew", "Korean"):
        saved(tmp_path / "images_background" / alphabet / "character01", 255)
    saved(tmp_path / "images_evaluation" / "Tibetan" / "character01", 0)
    parts = SOURCES["omniglot"](path=str(tmp_path))
    names = {name: {n.split("/")[0] for n in part.names} for name, part in parts.items()}
    assert names["train"] | names["validation"] == {"Greek", "Hebrew", "Korean"} and names["test"] == {"Tibetan"}
    assert names["train"] and names["validation"] and not names["train"] & names["validation"]
    assert parts["test"].x.shape == (2, 28, 28, 1) and parts["test"].x.min() == 255 and parts["train"].x.max() == 0
    assert all(len(rows) == 2 for part in parts.values() for rows in part.rows)


def test_mini_imagenet_has_its_parts_in_folders(tmp_path):
    for folder in ("train", "val", "test"):
        saved(tmp_path / folder / f"{folder}01", (10, 20, 30), "RGB")
    parts = SOURCES["mini_imagenet"](path=str(tmp_path), size=8)
    assert {name: part.names for name, part in parts.items()} == {
        "train": ("train01",),
        "validation": ("val01",),
        "test": ("test01",),
    }
    assert parts["train"].x.shape == (2, 8, 8, 3) and parts["train"].x[0, 0, 0].tolist() == [10, 20, 30]
    with pytest.raises(ValueError, match="class folders: no such file"):
        SOURCES["mini_imagenet"](path=str(tmp_path / "elsewhere"))


def test_fashion_shows_no_kind_of_the_test_in_training(monkeypatch):
    y = np.arange(40, dtype=np.int32) % 10
    x = np.zeros((40, 28, 28, 1), np.uint8)
    monkeypatch.setattr("research.data.few_shot.fashion_mnist", lambda: {"train": (x, y), "test": (x[:20], y[:20])})
    parts = SOURCES["fashion_mnist"]()
    assert sorted((*FASHION["train"], *FASHION["test"])) == list(range(10))
    assert parts["train"].names == tuple(map(str, FASHION["train"])) and len(parts["test"].rows[0]) == 2


def test_letters_are_there_without_a_download():
    parts = SOURCES["letters"]()
    assert parts["train"].x.shape == (60 * 20, 28, 28, 1) and parts["train"].names[30] == "Latin A"


def idx(path, array):
    path.write_bytes(
        gzip.compress(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes())
    )
    return str(path)


def test_digits_of_idx_files_are_parted_by_label(tmp_path):
    y = np.arange(30) % 10
    files = {
        f"{part}_images": idx(tmp_path / f"{part}x", np.stack([y] * 16, -1).reshape(30, 4, 4)) for part in ("train", "test")
    }
    labels = {f"{part}_labels": idx(tmp_path / f"{part}y", y) for part in ("train", "test")}
    parts = SOURCES["idx"](**files, **labels)
    assert {name: part.names for name, part in parts.items()} == {
        "train": tuple("02468"),
        "validation": tuple("13579"),
        "test": tuple("13579"),
    }
    assert all(set(part.x[rows].ravel()) == {int(name)} for part in parts.values() for name, rows in zip(part.names, part.rows))
    with pytest.raises(ValueError, match="1 labels; two are wanted at least"):
        SOURCES["idx"](**files, **labels | {"train_labels": idx(tmp_path / "one", np.zeros(30))})
