"""One-line messages for bad input: what was given and what comes nearest to it."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Iterable, Iterator


def nearest(given: str, allowed: Iterable[str]) -> str:
    """`"; nearest: 'x' (of 'x', 'y')"` to end a message with, `"; there are none"` where nothing is allowed."""
    names = sorted(set(allowed))
    if not names:
        return "; there are none"
    match = difflib.get_close_matches(given, names, n=1, cutoff=0.0)
    shown = ", ".join(repr(name) for name in names[:8]) + (", ..." if len(names) > 8 else "")
    return f"; nearest: {match[0]!r} (of {shown})" if match else f"; allowed: {shown}"


def reason(error: BaseException) -> str:
    """The first line of an exception's message, its type's name where it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


@contextlib.contextmanager
def about(where: str) -> Iterator[None]:
    """Puts `where`, such as a file's name, before the message of a ValueError raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


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
