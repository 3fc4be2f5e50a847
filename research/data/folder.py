"""Where fetched data sets are kept."""

from __future__ import annotations

import os
import tempfile


def data_folders() -> list[str]:
    """Where data may lie, the first choice first: $GNOMON_DATA alone if it is set, else gnomon/ in the user's cache
    ($XDG_CACHE_HOME or ~/.cache) and ./data."""
    chosen = os.environ.get("GNOMON_DATA")
    if chosen:
        return [os.path.expanduser(chosen)]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return [os.path.join(cache, "gnomon"), os.path.join(os.getcwd(), "data")]


def writable_folder(name: str) -> str:
    """`name` in the first of `data_folders` that can be written to, made if it is missing.

    Raises ValueError (one line) where none can.
    """
    reasons = []
    for folder in (os.path.join(parent, name) for parent in data_folders()):
        try:
            return made_writable(folder)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(f"no place for {name}: {'; '.join(reasons)}; name one in GNOMON_DATA")


def made_writable(folder: str) -> str:
    """The folder, made if it is missing. Raises ValueError (one line) where nothing can be written to it."""
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # a read-only file system is seen by no permission bit
    except OSError as error:
        raise ValueError(f"{folder!r} cannot be written to: {error.strerror}") from None
    return folder
