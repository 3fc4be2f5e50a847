"""Names given by a person: found in a table or refused in one line with the nearest match."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """The allowed name most like `name`, None where none is much like it (similarity below 0.5)."""
    names = [str(a) for a in allowed]
    folded = {a.lower(): a for a in reversed(names)}
    found = difflib.get_close_matches(str(name).lower(), list(folded), n=1, cutoff=0.5)
    return folded[found[0]] if found else None


def suggestion(name: str, allowed: Iterable[str]) -> str:
    """The end of a one-line error: "; nearest: x" where there is one, else ""."""
    found = nearest(name, allowed)
    return f"; nearest: {found!r}" if found is not None else ""


def choose(table: Mapping[str, T], name: str, what: str) -> T:
    """`table[name]`. `what` says in the error where the name was given, such as "model.kind".

    Raises ValueError (one line: what was given, what is allowed, the nearest match) where `name` is not in the table.
    """
    if name in table:
        return table[name]
    raise ValueError(f"{what}={name!r} is unknown; allowed: {', '.join(sorted(table))}{suggestion(name, table)}")


def keywords(fn: Callable[..., Any]) -> tuple[list[str], list[str]]:
    """(all keywords that `fn` takes, those of them that it requires), in the order of its signature."""
    takes = [
        p
        for p in inspect.signature(fn).parameters.values()
        if p.kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    ]
    return [p.name for p in takes], [p.name for p in takes if p.default is inspect.Parameter.empty]


def call_checked(fn: Callable[..., T], kwargs: Mapping[str, Any], where: str) -> T:
    """`fn(**kwargs)` after comparing the keywords with its signature. `where` names the section of the config, such as "model".

    Raises ValueError (one line) for an unknown keyword, with the nearest match, and for missing ones.
    """
    allowed, required = keywords(fn)
    for name in kwargs:
        if name not in allowed:
            listed = ", ".join(allowed) or "none"
            raise ValueError(f"{where}.{name} is unknown; allowed in {where}: {listed}{suggestion(name, allowed)}")
    missing = [name for name in required if name not in kwargs]
    if missing:
        raise ValueError(
            f"{where} lacks {', '.join(f'{where}.{name}' for name in missing)}; given: {', '.join(kwargs) or 'none'}"
        )
    return fn(**kwargs)
