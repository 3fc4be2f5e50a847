"""One-line messages for bad input: what was given and what comes nearest to it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable


def nearest(given: str, allowed: Iterable[str]) -> str:
    """`"; nearest: 'x' (of 'x', 'y')"` to end a message with, `"; there are none"` where nothing is allowed."""
    names = sorted(set(allowed))
    if not names:
        return "; there are none"
    match = difflib.get_close_matches(given, names, n=1, cutoff=0.0)
    shown = ", ".join(repr(name) for name in names[:8]) + (", ..." if len(names) > 8 else "")
    return f"; nearest: {match[0]!r} (of {shown})" if match else f"; allowed: {shown}"


def no_such_file(path: str | os.PathLike[str]) -> str:
    """`"no such file: ..."` with the nearest existing name beside it, or the first folder on the way that is missing."""
    text = os.fspath(path)
    folder, name = os.path.split(os.path.abspath(os.path.expanduser(text)))
    while not os.path.isdir(folder):
        folder, name = os.path.split(folder)
    return f"no such file: {text!r}; {folder!r} has no {name!r}{nearest(name, os.listdir(folder))}"


def existing_file(path: str | os.PathLike[str]) -> str:
    """The path with `~` expanded. Raises ValueError (one line, nearest name) unless it is a file."""
    text = os.path.expanduser(os.fspath(path))
    if os.path.isdir(text):
        raise ValueError(f"a file is wanted, {os.fspath(path)!r} is a folder")
    if not os.path.isfile(text):
        raise ValueError(no_such_file(path))
    return text
