"""Arrays in memory as a Source, from npz files or directly; and a split of their rows."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from research.data.determinism import digest, permutation
from research.data.errors import existing_file, nearest, reason
from research.data.streams import Record, Source

DEVICE_DTYPES = {"f": np.float32, "i": np.int32, "u": np.int32}  # of what is wider than 32 bits
# What reading a damaged npz file raises.
DAMAGED = (ValueError, OSError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)
MAX_INT32 = np.iinfo(np.int32).max


class _Arrays:
    def __init__(self, arrays: Record):
        self._arrays = arrays
        self._length = len(next(iter(arrays.values())))
        self.fingerprint = f"arrays {digest(*(part for name in sorted(arrays) for part in (name, arrays[name])))}"

    def __len__(self) -> int:
        return self._length

    def gather(self, rows: np.ndarray, epoch: int) -> Record:
        return {name: array[rows] for name, array in self._arrays.items()}


def array_source(arrays: Mapping[str, np.ndarray]) -> Source:
    """Records {name: array[i]}, such as {"inputs", "targets"}. 64-bit floats become float32 and 64-bit integers int32, as JAX
    would have them; other dtypes stay.

    Raises ValueError: no arrays, first axes of unequal length, an integer that int32 does not hold, or no numbers at all.
    """
    if not arrays:
        raise ValueError("arrays: given none, {name: array [n, ...]} is wanted")
    held = {name: _narrow(name, np.asarray(array)) for name, array in arrays.items()}
    lengths = {name: array.shape[0] if array.ndim else None for name, array in held.items()}
    if None in lengths.values() or len(set(lengths.values())) > 1:
        raise ValueError(f"arrays of one length are wanted, given {', '.join(f'{n} {held[n].shape}' for n in held)}")
    if not next(iter(lengths.values())):
        raise ValueError(f"arrays {', '.join(held)} hold no records")
    return _Arrays(held)


def _narrow(name: str, array: np.ndarray) -> np.ndarray:
    kind = array.dtype.kind
    if kind not in "biuf":
        raise ValueError(f"array {name!r}: numbers are wanted, given dtype {array.dtype}")
    if kind == "b" or array.dtype.itemsize <= 4 and array.dtype != np.uint32:
        return array
    if kind != "f" and array.size and not np.iinfo(np.int32).min <= array.min() <= array.max() <= np.iinfo(np.int32).max:
        raise ValueError(f"array {name!r}: holds {array.min()} to {array.max()}, which int32 does not")
    return array.astype(DEVICE_DTYPES[kind])


def read_npz(path: str | os.PathLike[str], names: Sequence[str]) -> dict[str, np.ndarray]:
    """The named arrays of an npz file.

    Raises ValueError: no such file, no npz or a damaged one, no such array (nearest), pickled objects.
    """
    file = existing_file(path)
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{os.fspath(path)!r} is not an npz file")
    try:
        with np.load(file, allow_pickle=False) as archive:
            held = archive.files
            arrays = {name: archive[name] for name in names if name in held}
    except DAMAGED as error:
        raise ValueError(f"{os.fspath(path)!r} cannot be read: {reason(error)}") from None
    for name in names:
        if name not in arrays:
            raise ValueError(f"{os.fspath(path)!r} holds no array {name!r}{nearest(name, held)}")
    return arrays


def class_labels(array: np.ndarray, name: str = "labels") -> np.ndarray:
    """int32 [n], indices of classes, of integers or booleans [n] or [n, 1] of any width.

    Raises ValueError, beginning with `name`: another shape or dtype, such as one-hot rows; an index below 0 or past int32.
    """
    labels = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if labels.ndim != 1 or labels.dtype.kind not in "biu":
        raise ValueError(
            f"{name}: integers [n] or [n, 1], the indices of classes, are wanted, given {array.dtype} {array.shape}"
        )
    if labels.size and not 0 <= labels.min() <= labels.max() <= MAX_INT32:
        raise ValueError(f"{name}: given {labels.min()} to {labels.max()}, allowed 0 to {MAX_INT32}")
    return labels.astype(np.int32)


def floats(array: np.ndarray, name: str) -> np.ndarray:
    """float32 of numbers or booleans of any width, in their shape.

    Raises ValueError, beginning with `name`: no numbers, or some that are not finite in float32.
    """
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name}: numbers are wanted, given {array.dtype} {array.shape}")
    with np.errstate(over="ignore"):
        converted = array.astype(np.float32)
    bad = converted.size - np.count_nonzero(np.isfinite(converted))
    if bad:
        raise ValueError(f"{name}: {bad} of {converted.size} numbers are not finite in float32")
    return converted


def split_rows(count: int, held_out: int | float, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows to keep, rows held out) of range(count), sorted int64: a random choice that depends on the arguments alone. For a
    validation split of a training set: `subset(source, rows)`, or `array[rows]`.

    Args:
      held_out: how many (an int), or what fraction (a float below 1), rounded.

    Raises ValueError where either part would be empty.
    """
    number = round(count * held_out) if isinstance(held_out, float) else held_out
    if not 0 < number < count:
        raise ValueError(f"held_out: given {held_out}, which holds out {number} of {count}; allowed 1 to {count - 1}")
    order = permutation(count, seed)
    return np.sort(order[number:]), np.sort(order[:number])
