"""Files that are there whole or not at all: atomic writes, and folders sealed by a manifest of hashes.

A sealed folder holds `manifest.json`: {"files": {path: {"bytes": int, "sha256": hex}}} over every other file in it. It is
written under a temporary name, sealed, synced and renamed into place last, so a process killed at any moment leaves a whole
folder under the final name or a temporary one that may be thrown away.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

MANIFEST = "manifest.json"


def plain(value: Any) -> Any:
    """The same value as JSON has it: arrays as lists, mappings as dicts, and null for NaN and infinities, which JSON lacks.

    Raises ValueError, naming the type, for what is none of these.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        array = np.asarray(value)
        wide = array.astype(np.float64) if array.dtype.kind not in "biuSU" else array
        return plain(wide.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise ValueError(f"{value!r} of type {type(value).__name__} is no JSON value; allowed: numbers, strings, lists, dicts")


def json_bytes(value: Any, indent: int | None = 1) -> bytes:
    """UTF-8 JSON of `plain(value)` and a newline; never NaN or Infinity, which other readers refuse."""
    return (json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sync_directory(directory: Path) -> None:
    """Waits until the names in `directory` are on disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Replaces `path` by `data`, on disk before this returns; a reader sees the old bytes or the new ones, never a part.

    Raises OSError that names `path` (a write to a full disk names nothing by itself).
    """
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def append_whole(descriptor: int, data: bytes, path: Path) -> None:
    """Appends all of `data` to an open file, or nothing of it: then it raises OSError that names `path`."""
    size = os.fstat(descriptor).st_size
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError as error:
        os.ftruncate(descriptor, size)
        raise OSError(error.errno, error.strerror, str(path)) from error


def files_in(directory: Path) -> list[Path]:
    """Every file below `directory`, in order of path, the manifest left out."""
    return sorted(p for p in directory.rglob("*") if p.is_file() and p != directory / MANIFEST)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(directory: Path) -> None:
    """Writes the manifest of `directory` and waits until all of it is on disk."""
    files = files_in(directory)
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(sha256_of, files))
    listed = {p.relative_to(directory).as_posix(): {"bytes": p.stat().st_size, "sha256": h} for p, h in zip(files, hashes)}
    write_whole(directory / MANIFEST, json_bytes({"files": listed}))
    for below in sorted({p.parent for p in files}, reverse=True):
        sync_directory(below)


def _listed(directory: Path) -> dict[Path, tuple[int, str]]:
    entries = json.loads((directory / MANIFEST).read_bytes())["files"]
    return {directory / name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}


def damage(directory: Path) -> str | None:
    """What is wrong with a sealed folder, naming the first file that is not as it was written; None where it is intact."""
    path = directory / MANIFEST
    try:
        listed = _listed(directory)
        for path, (size, _) in listed.items():
            if path.stat().st_size != size:
                return f"{path} has {path.stat().st_size} bytes of {size}"
        with ThreadPoolExecutor() as pool:
            hashes = {path: pool.submit(sha256_of, path) for path in listed}
            for path, (_, written) in listed.items():
                if hashes[path].result() != written:
                    return f"{path} does not hold what was written (its sha256 differs)"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{path} is no manifest ({type(error).__name__})"
    return None
