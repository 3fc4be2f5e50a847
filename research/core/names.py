"""Names given by a person: found in a table or refused in one line with the nearest match."""

from __future__ import annotations

import difflib
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
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

    Raises ValueError (one line) for an unknown keyword, with the nearest match, for missing ones, and for a value that is not
    of the plain type (int, float, bool, str, a sequence or mapping of them) that the signature says.
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
    hints = typing.get_type_hints(_undone(fn))
    for name, value in kwargs.items():
        if not _fits(value, hints.get(name, Any)):
            raise ValueError(f"{where}.{name}={value!r} is of the wrong type; allowed: {_said(hints[name])}")
    return fn(**kwargs)


def _said(hint: Any) -> str:
    """A type as a person writes it: float, Sequence[float], Mapping[str, float]."""
    plain = isinstance(hint, type) and not typing.get_args(hint)
    return hint.__name__ if plain else str(hint).replace("collections.abc.", "").replace("typing.", "")


def _undone(fn: Any) -> Any:
    """The function whose annotations say what `fn` takes."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return fn.__init__ if inspect.isclass(fn) else fn


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of a plain type; a hint of another kind allows all."""
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if hint is type(None):
        return value is None
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin in (Sequence, list, tuple) and not (origin is tuple and inner[-1] is not ...):
        return isinstance(value, (list, tuple)) and all(_fits(one, inner[0]) for one in value)
    if origin is Mapping:  # a section of a config is no Mapping, but has its methods
        return hasattr(value, "items") and all(_fits(key, inner[0]) and _fits(one, inner[1]) for key, one in value.items())
    return True
