"""Sections of a config as arguments: `{"name": "muon", "learning_rate": 0.02}` calls the table's "muon" with the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from research.core.config import is_section
from research.core.names import call_checked, choose, suggestion

T = TypeVar("T")


def arguments(section: Any, *without: str) -> dict[str, Any]:
    """The section's keys and values but for `without`; sections in it as dicts."""
    return {k: arguments(v) if is_section(v := section[k]) else v for k in section if k not in without}


def called(table: Mapping[str, Callable[..., T]], section: Any, where: str, *first: Any, **more: Any) -> T:
    """The member of `table` that `section.name` says, called with the section's other keys, after `first` and with `more`.

    Raises ValueError (one line) on an unknown name, an unknown key, a missing key.
    """
    if "name" not in section:
        raise ValueError(f"{where} lacks {where}.name; allowed: {', '.join(sorted(table))}")
    member = choose(table, section["name"], f"{where}.name")
    return call_checked(partial(member, *first, **more), arguments(section, "name"), where)


def wrapped(inner: T, table: Mapping[str, Callable[..., T]], section: Any, where: str) -> T:
    """`inner`, wrapped by what `section.wrap` lists, the first one innermost; each takes its keys from `section.<its name>`.

    Raises ValueError on a name that the table does not have or that is listed twice, and on a key that nothing would read.
    """
    if "wrap" not in section:
        raise ValueError(f"config lacks {where}.wrap; allowed: a list of {', '.join(sorted(table))}")
    names: Sequence[str] = section["wrap"]
    if not isinstance(names, (list, tuple)):
        raise ValueError(f"{where}.wrap={names!r} is no list; allowed: a list of {', '.join(sorted(table))}")
    for key in section:
        if key not in ("wrap", *names):
            if key in table:
                raise ValueError(f"{where}.{key} has keys, but {where}.wrap={list(names)!r} does not list {key!r}")
            raise ValueError(
                f"config key {where}.{key} is unknown; allowed: {', '.join(sorted(table))}{suggestion(key, table)}"
            )
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{where}.wrap={list(names)!r} lists {name!r} twice; allowed: once")
        wrap = choose(table, name, f"{where}.wrap")
        given = section.get(name, {})
        inner = call_checked(partial(wrap, inner), arguments(given), f"{where}.{name}")
    return inner


def only(section: Any, allowed: Sequence[str], where: str) -> None:
    """ValueError on a key that nothing would read."""
    for key in section:
        if key not in allowed:
            name = f"{where}.{key}" if where else key
            raise ValueError(f"config key {name} is unknown; allowed: {', '.join(allowed)}{suggestion(key, allowed)}")
    for key in allowed:
        if key not in section:
            raise ValueError(f"config lacks {where + '.' if where else ''}{key}; it has {', '.join(section)}")
