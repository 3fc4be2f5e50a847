"""The source of Python's own standard library: a corpus that every machine with Python has.

Every `*.py` below the library's root of the running base interpreter, except where a part of the path is test, tests, idle_test
or site-packages. The split is by the sha256 of the path relative to that root, as POSIX text, modulo 20: 0 is test, 1
validation, the rest training. Documents stand in the order of that path. Other Pythons hold other sources: scores compare on
one Python only.
"""

from __future__ import annotations

import functools
import os
import sys
import sysconfig

from research.data.documents import Document, by_hash
from research.data.text import Corpus, corpus
from research.data.tokenizer import bytes_tokenizer

LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages"})


def root() -> str:
    """The folder of the standard library's source; a virtual environment's is that of the interpreter it was made from."""
    return sysconfig.get_path("stdlib")


def documents(folder: str | None = None) -> list[Document]:
    """All of the library's files in path order, the test split's included: 734 files on Python 3.11.7.

    Raises ValueError where the interpreter ships no source.
    """
    top = root() if folder is None else folder
    names = []
    for here, folders, files in os.walk(top):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        names += [os.path.join(here, name) for name in files if name.endswith(".py") and name not in LEFT_OUT]
    relative = sorted((os.path.relpath(name, top).replace(os.sep, "/"), name) for name in names if os.path.isfile(name))
    if not relative:
        raise ValueError(
            f"Python {sys.version.split()[0]} ships no source of its standard library: no .py file below {top!r} "
            "(zipped or compiled only); use another Python, or lm/text.py with files of your own"
        )
    found = []
    for name, path in relative:
        with open(path, "rb") as handle:
            found.append(Document(name, handle.read(), name.encode()))
    return found


@functools.lru_cache(maxsize=1)
def splits() -> dict[str, Corpus]:
    """{"train", "validation", "test"}, as bytes. `tokens.tobytes()` of a corpus is its files joined."""
    parts = by_hash(documents())
    version = ".".join(map(str, sys.version_info[:3]))
    return {part: corpus(held, bytes_tokenizer(), f"stdlib {version} {part}") for part, held in parts.items()}
