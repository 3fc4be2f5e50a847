"""Images and arrays: what is in the files is what a batch holds."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest

from research.data.arrays import array_source, class_labels, floats, read_npz, split_rows
from research.data.images import (
    channel_statistics,
    image_source,
    images_from_folders,
    images_from_idx,
    images_from_npz,
    read_idx,
)
from research.data.streams import ordered_batches, subset, train_batches

CODES = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}


def idx(array: np.ndarray, code: str = "u1") -> bytes:
    header = struct.pack(f">HBB{array.ndim}I", 0, CODES[code], array.ndim, *array.shape)
    return header + array.astype(f">{code}").tobytes()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("code", sorted(CODES))
def test_idx_files_of_every_dtype_are_read(tmp_path, code, packed):
    array = np.arange(-12 if code[0] != "u" else 0, 12).reshape(2, 3, -1)
    content = idx(array, code)
    (tmp_path / "file").write_bytes(gzip.compress(content) if packed else content)
    read = read_idx(tmp_path / "file")
    np.testing.assert_array_equal(read, array.astype(code))
    assert read.dtype == np.dtype(code) and read.dtype.isnative


def test_images_stay_uint8_and_batches_are_normalized_float32(tmp_path):
    x = np.random.RandomState(0).randint(0, 256, (5, 4, 3)).astype(np.uint8)
    y = np.asarray([3, 1, 0, 2, 1], np.uint8)
    (tmp_path / "x").write_bytes(idx(x))
    (tmp_path / "y").write_bytes(idx(y))
    held = images_from_idx(tmp_path / "x", tmp_path / "y")
    assert held.x.shape == (5, 4, 3, 1) and held.x.dtype == np.uint8 and held.y.dtype == np.int32
    batches = list(ordered_batches(image_source(held.x, held.y, mean=0.3, std=0.5), 4).open())
    inputs = np.concatenate([batch["inputs"] for batch in batches])[:5]
    assert inputs.dtype == np.float32
    np.testing.assert_allclose(inputs[..., 0], (x / 255 - 0.3) / 0.5, atol=1e-6)
    np.testing.assert_array_equal(np.concatenate([batch["targets"] for batch in batches])[:5], y)
    np.testing.assert_array_equal(np.concatenate([batch["mask"] for batch in batches]), [1, 1, 1, 1, 1, 0, 0, 0])
    sources = [image_source(held.x, held.y), image_source(held.x, held.y, mean=0.1), image_source(held.x, held.y[::-1])]
    assert len({source.fingerprint for source in sources}) == 3


def test_channel_statistics_are_those_of_the_images():
    x = np.random.RandomState(1).randint(0, 256, (6, 5, 4, 3)).astype(np.uint8)
    mean, std = channel_statistics(x)
    np.testing.assert_allclose(mean, (x / 255).mean((0, 1, 2)), atol=1e-12)
    np.testing.assert_allclose(std, (x / 255).std((0, 1, 2)), atol=1e-12)
    every = image_source(x, np.zeros(6, int), mean=mean, std=std).gather(np.arange(6), 0)["inputs"]
    np.testing.assert_allclose(every.mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(every.std((0, 1, 2)), 1, atol=1e-5)


def test_images_of_npz(tmp_path):
    x, y = np.zeros((3, 2, 2, 3), np.uint8), np.asarray([[0], [1], [1]])
    np.savez(tmp_path / "i.npz", pictures=x, labels=y)
    held = images_from_npz(tmp_path / "i.npz", "pictures", "labels")
    assert held.x.shape == (3, 2, 2, 3) and held.y.tolist() == [0, 1, 1]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_of_class_folders(tmp_path, channels):
    image = pytest.importorskip("PIL.Image")
    for name, level in (("dog/b.png", 10), ("dog/a.PNG", 20), ("cat/x.png", 30), ("cat/notes.txt", 0), (".hidden/x.png", 0)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pixels = np.full((4, 6), level, np.uint8)
        image.fromarray(pixels).save(tmp_path / name, format="PNG")
    held = images_from_folders(tmp_path, channels)
    assert held.classes == ("cat", "dog") and held.y.tolist() == [0, 1, 1]
    assert held.x.shape == (3, 4, 6, channels) and held.x[:, 0, 0, 0].tolist() == [30, 20, 10]


def test_16_bits_become_the_nearest_of_8(tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "cat").mkdir()
    levels = np.asarray([[0, 128, 129, 257, 1000, 32768, 65406, 65407, 65535]], np.uint16)
    image.fromarray(levels).save(tmp_path / "cat" / "a.png")
    assert image.open(tmp_path / "cat" / "a.png").mode.startswith("I;16")
    for channels in (1, 3):
        held = images_from_folders(tmp_path, channels)
        assert held.x[0, 0, :, -1].tolist() == [0, 0, 1, 1, 4, 128, 254, 255, 255]


LABELS = [np.asarray([3, 0, 2], dtype) for dtype in (np.uint8, np.int8, np.int64, np.uint64)]


@pytest.mark.parametrize(
    "given", [*LABELS, LABELS[0][:, None], np.asarray([True, False, True])], ids=lambda y: f"{y.dtype} {y.ndim}"
)
def test_labels_of_any_width_are_int32(given):
    labels = class_labels(given)
    assert labels.dtype == np.int32 and labels.tolist() == given.ravel().astype(int).tolist()


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int64, np.float16, np.float64])
def test_numbers_of_any_width_are_float32(dtype):
    given = np.asarray([[0, 1], [1, 1]], dtype)
    held = floats(given, "x")
    assert held.dtype == np.float32 and held.tolist() == given.astype(float).tolist()


def test_arrays_are_narrowed_to_what_jax_holds(tmp_path):
    arrays = {"inputs": np.linspace(0, 1, 6).reshape(3, 2), "targets": np.arange(3), "flags": np.asarray([True, False, True]),
              "bytes": np.arange(3, dtype=np.uint8), "counts": np.arange(3, dtype=np.uint32)}  # fmt: skip
    np.savez(tmp_path / "a.npz", **arrays)
    source = array_source(read_npz(tmp_path / "a.npz", list(arrays)))
    batch = next(ordered_batches(source, 3).open())
    dtypes = {name: str(array.dtype) for name, array in batch.items()}
    assert dtypes == {
        "inputs": "float32",
        "targets": "int32",
        "flags": "bool",
        "bytes": "uint8",
        "counts": "int32",
        "mask": "float32",
    }
    np.testing.assert_allclose(batch["inputs"], arrays["inputs"], atol=1e-7)


def test_a_split_of_rows_is_a_partition_that_depends_on_its_seed_alone():
    kept, held_out = split_rows(100, 0.2, seed=1)
    assert len(held_out) == 20 and sorted([*kept, *held_out]) == list(range(100))
    assert all(np.array_equal(a, b) for a, b in zip(split_rows(100, 20, seed=1), (kept, held_out), strict=True))
    assert not np.array_equal(split_rows(100, 20, seed=2)[1], held_out)
    source = array_source({"targets": np.arange(100)})
    validation = list(ordered_batches(subset(source, held_out), 10).open())
    assert np.concatenate([batch["targets"] for batch in validation]).tolist() == held_out.tolist()
    iterator = train_batches(subset(source, kept), 10, seed=0, remainder="drop").open()
    seen = {int(t) for _ in range(8) for t in next(iterator)["targets"]}
    assert seen == set(kept.tolist())
