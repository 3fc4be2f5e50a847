"""Labelled images: IDX files, npz files, folders of classes; kept as uint8, made float32 batch by batch."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from research.data.arrays import class_labels, read_npz
from research.data.determinism import digest
from research.data.errors import about, existing_file, no_such_file, reason
from research.data.streams import Record, Source

IDX_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg")
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Images(NamedTuple):
    """x: uint8 [n, height, width, channels]; y: int32 [n], indices of classes; classes: their names, where they have any."""

    x: np.ndarray
    y: np.ndarray
    classes: tuple[str, ...] = ()


def images(x: np.ndarray, y: np.ndarray, classes: Sequence[str] = ()) -> Images:
    """Checked Images of x uint8 [n, h, w] or [n, h, w, c] and integer or boolean y [n] or [n, 1].

    Raises ValueError: other shapes or dtypes, images and labels of unequal number, labels below 0, no images.
    """
    if x.ndim not in (3, 4) or x.dtype != np.uint8:
        raise ValueError(
            f"images: uint8 [n, height, width] or [n, height, width, channels] is wanted, given {x.dtype} {x.shape}"
        )
    if x.ndim == 3:
        x = x[..., None]
    y = class_labels(y)
    if len(x) != len(y):
        raise ValueError(f"images and labels: given {len(x)} images and {len(y)} labels, one each is wanted")
    if not len(x):
        raise ValueError("images: given none")
    if classes and y.max() >= len(classes):
        raise ValueError(f"labels: given {y.min()} to {y.max()}, allowed 0 to {len(classes) - 1}")
    return Images(x, y, tuple(classes))


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """The array of an IDX file (the format of MNIST: magic 0, 0, dtype, rank; big-endian lengths; values), gzipped or not, in
    native byte order.

    Raises ValueError: no such file, wrong magic, truncated or too long (bytes wanted and given).
    """
    file, name = existing_file(path), os.fspath(path)
    with open(file, "rb") as handle:
        content = handle.read()
    if content[:2] == b"\x1f\x8b":
        content = _unpacked(content, name)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in IDX_DTYPES:
        codes = ", ".join(f"{code:#04x}" for code in IDX_DTYPES)
        raise ValueError(
            f"{name!r} is not an IDX file: it begins with {content[:4].hex(' ')}, 00 00 and one of {codes} is wanted"
        )
    dtype, rank = np.dtype(IDX_DTYPES[content[2]]), content[3]
    begin = 4 + 4 * rank
    shape = tuple(int(n) for n in np.frombuffer(content[4:begin].ljust(4 * rank, b"\0"), ">u4"))
    wanted = begin + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if len(content) < begin or len(content) != wanted:
        word = "truncated" if len(content) < max(begin, wanted) else "too long"
        raise ValueError(
            f"{name!r} is {word}: {len(content)} bytes given, {max(begin, wanted)} wanted for {dtype.name} {shape}"
        )
    return np.frombuffer(content, dtype, offset=begin).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def _unpacked(content: bytes, name: str) -> bytes:
    try:
        return gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{name!r} is truncated or damaged: {len(content)} bytes of gzip given, {error}") from None


def images_from_idx(image_file: str | os.PathLike[str], label_file: str | os.PathLike[str]) -> Images:
    """Images of a pair of IDX files. Raises ValueError as `read_idx` and `images` do, naming the files."""
    x, y = read_idx(image_file), read_idx(label_file)
    with about(f"{os.fspath(image_file)!r} and {os.fspath(label_file)!r}"):
        return images(x, y)


def images_from_npz(path: str | os.PathLike[str], image_name: str, label_name: str) -> Images:
    """Images of two arrays of an npz file. Raises ValueError as `read_npz` and `images` do, naming the file."""
    arrays = read_npz(path, [image_name, label_name])
    with about(repr(os.fspath(path))):
        return images(arrays[image_name], arrays[label_name])


def images_from_folders(folder: str | os.PathLike[str], channels: int = 3) -> Images:
    """Images of `folder/<class>/*.png` (.jpg, .jpeg), all of one size; classes and files in sorted order.

    Args:
      channels: 1 grey, 3 colour, 4 with transparency; files are converted, those of 16 bits by scaling 0..65535 to 0..255.

    Raises ValueError: no such folder, no class folders, a class without images, an image that cannot be read or that holds
    32-bit numbers, whose scale no file says, unequal sizes, or the package pillow is not installed.
    """
    top = os.path.expanduser(os.fspath(folder))
    if channels not in PIL_MODES:
        raise ValueError(f"channels: given {channels}, allowed {', '.join(map(str, PIL_MODES))}")
    if not os.path.isdir(top):
        raise ValueError(f"image folder: {no_such_file(folder)}")
    classes = sorted(entry.name for entry in os.scandir(top) if entry.is_dir() and not entry.name.startswith("."))
    files = [(label, file) for label, name in enumerate(classes) for file in _image_files(os.path.join(top, name))]
    if not classes:
        raise ValueError(f"image folder {os.fspath(folder)!r} holds no class folders; <class>/<image>.png is wanted")
    pixels = _pixels([file for _, file in files], PIL_MODES[channels])
    return images(pixels.reshape(*pixels.shape[:3], channels), np.asarray([label for label, _ in files]), classes)


def _image_files(folder: str) -> list[str]:
    files = sorted(entry.path for entry in os.scandir(folder) if entry.name.lower().endswith(IMAGE_ENDINGS))
    if not files:
        raise ValueError(f"class folder {folder!r} holds no images ({', '.join(IMAGE_ENDINGS)})")
    return files


def _pixels(files: Sequence[str], mode: str) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError:
        raise ValueError(f"{files[0]!r} needs the package pillow: pip install pillow") from None
    loaded: list[np.ndarray] = []
    for file in files:
        try:
            with Image.open(file) as image:
                if image.mode.startswith("I;16"):  # convert() would make 255 of all that is above
                    image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
                if image.mode[0] in "IF":
                    raise ValueError(f"8 or 16 bits a channel are wanted, given 32 (mode {image.mode!r})")
                pixels = np.asarray(image.convert(mode))
        except Exception as error:  # PIL raises plain Exceptions too, as for an image that is too large
            raise ValueError(f"image {file!r} cannot be read: {reason(error)}") from None
        if loaded and pixels.shape != loaded[0].shape:
            sizes = f"{_size(pixels)}, {files[0]!r} {_size(loaded[0])}"
            raise ValueError(f"images of one size are wanted: {file!r} is {sizes} (height x width)")
        loaded.append(pixels)
    return np.stack(loaded)


def _size(pixels: np.ndarray) -> str:
    return "x".join(map(str, pixels.shape[:2]))


class _ImageSource:
    def __init__(self, held: Images, mean: np.ndarray, std: np.ndarray):
        self._held = held
        self._scale, self._shift = np.float32(1) / (255 * std), -mean / std
        self.fingerprint = f"images {digest(held.x, held.y)} mean={mean.tolist()} std={std.tolist()}"

    def __len__(self) -> int:
        return len(self._held.x)

    def gather(self, rows: np.ndarray, epoch: int) -> Record:
        return {"inputs": self._held.x[rows] * self._scale + self._shift, "targets": self._held.y[rows]}


def image_source(
    x: np.ndarray, y: np.ndarray, *, mean: float | Sequence[float] = 0.0, std: float | Sequence[float] = 1.0
) -> Source:
    """Records {"inputs": float32 [height, width, channels], "targets": int32 []}, inputs being (x / 255 - mean) / std.

    Args:
      x: uint8 [n, height, width, channels] (or without channels), kept as it is.
      y: integer labels [n].
      mean, std: one number, or one a channel, of images scaled to 0..1. See `channel_statistics`.

    Raises ValueError for another number of channels, a std that is not above 0, and as `images` does.
    """
    held = images(x, y)
    channels = held.x.shape[-1]
    moments = [np.asarray(value, np.float32) for value in (mean, std)]
    for name, value in zip(("mean", "std"), moments, strict=True):
        if value.shape not in ((), (channels,)):
            raise ValueError(f"{name}: given {value.size} numbers for {channels} channels, allowed 1 or {channels}")
    if not (moments[1] > 0).all():
        raise ValueError(f"std: given {std}, allowed above 0")
    return _ImageSource(held, *moments)


def channel_statistics(x: np.ndarray) -> tuple[list[float], list[float]]:
    """(mean, std) of each channel of uint8 [n, h, w, c], scaled to 0..1; to be taken from the training split."""
    levels = np.arange(256) / 255
    means, stds = [], []
    for c in range(x.shape[-1]):
        share = np.bincount(x[..., c].ravel(), minlength=256) / x[..., c].size  # exact, and without a float copy of the images
        means.append(float(share @ levels))
        stds.append(float(np.sqrt(share @ (levels - means[-1]) ** 2)))
    return means, stds
