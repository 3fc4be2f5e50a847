"""Groups of parameters by path: their own learning rate and weight decay.

Groups are given as plain values, `{"embed": {"match": r"embed|head", "learning_rate": 3e-3, "weight_decay": 0.0}}`: the
regular expression is searched in the path joined by slashes, such as "blocks/0/attention/qkv/kernel". Each value of a
parameter is that of the first group that matches it and sets this value, else the optimizer's own: a group that sets the
weight decay alone leaves the learning rate to the others. First means by name, in the alphabet, for a ConfigDict has no other
order; a sequence of groups that hold their "name" has its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from research.core.names import call_checked, suggestion
from research.core.tree import Path, joined, leaves_with_paths
from research.core.types import Tree


class Group(NamedTuple):
    """Parameters that `takes(path, leaf)` is true of, and what it sets for them; None sets nothing. `pattern` is the
    regular expression that the group was given as, None for one that an optimizer adds itself, which may be empty."""

    name: str
    takes: Callable[[Path, Any], bool]
    pattern: str | None = None
    learning_rate: float | None = None
    factor: float | None = None
    weight_decay: float | None = None


class Values(NamedTuple):
    """What holds for one parameter: names of leaves of the optimizer's state, and the factor of the learning rate."""

    learning_rate: str
    factor: float
    weight_decay: str


def compiled(pattern: str, where: str) -> re.Pattern[str]:
    """The regular expression. ValueError (one line) where it is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where}={pattern!r} is no regular expression: {error}") from None


def group(
    *, match: str, learning_rate: float | None = None, factor: float | None = None, weight_decay: float | None = None
) -> Group:
    """A group, yet without its name, from plain values.

    match: regular expression, searched in the joined path.
    learning_rate: peak, instead of the optimizer's; it has a leaf of its own.
    factor: times the learning rate (layer-wise decay; widths): it follows where the optimizer's is varied.
    weight_decay: instead of the optimizer's; it has a leaf of its own.
    """
    if learning_rate is None and factor is None and weight_decay is None:
        raise ValueError(f"groups.match={match!r} sets nothing; allowed: learning_rate, factor, weight_decay")
    for name, value in {"learning_rate": learning_rate, "factor": factor, "weight_decay": weight_decay}.items():
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"groups.match={match!r}: {name}={value} is out of range: a finite number, 0 or above")
    found = compiled(match, "groups.match")
    return Group("", lambda path, leaf: bool(found.search(joined(path))), match, learning_rate, factor, weight_decay)


Configs = Mapping[str, Mapping[str, Any]] | Sequence[Mapping[str, Any]]


def groups(configs: Configs, where: str = "groups") -> tuple[Group, ...]:
    """The groups {name: keywords of `group`} by name, or [{"name": ..., keywords of `group`}] in order. The name is part
    of names in the optimizer's state, "learning_rate_<name>". ValueError on an unknown key, or a name that no leaf could
    have."""
    if hasattr(configs, "items"):  # a ConfigDict is no Mapping
        given = [dict(own, name=name) for name, own in sorted(configs.items())]
    else:
        given = [dict(own) for own in configs]
    made: dict[str, Group] = {}
    for own in given:
        name = own.pop("name", "")
        if not re.fullmatch(r"\w+", name) or name in made:
            wrong = "given twice" if name in made else "no name; allowed: letters, digits and underscores"
            raise ValueError(f"{where}: {name!r} is {wrong}")
        made[name] = call_checked(group, own, f"{where}.{name}")._replace(name=name)
    return tuple(made.values())


def assign(params: Tree, given: Sequence[Group]) -> dict[Path, Values]:
    """{path: Values} of every parameter. Raises ValueError where a group that was given as a pattern matches nothing,
    naming the nearest path, or where earlier groups set all that it sets."""
    used: set[int] = set()

    def first(path: Path, leaf: Any, value: str) -> Group | None:
        for i, g in enumerate(given):
            if getattr(g, value) is not None and g.takes(path, leaf):
                used.add(i)
                return g
        return None

    def leaf_name(value: str, g: Group | None) -> str:
        return value if g is None else f"{value}_{g.name}"

    out = {}
    for path, leaf in leaves_with_paths(params):
        scaled = first(path, leaf, "factor")
        rate, decay = first(path, leaf, "learning_rate"), first(path, leaf, "weight_decay")
        factor = 1.0 if scaled is None or scaled.factor is None else scaled.factor
        out[path] = Values(leaf_name("learning_rate", rate), factor, leaf_name("weight_decay", decay))
    for i, g in enumerate(given):
        if i not in used and g.pattern is not None:
            _refuse(g, params, given[:i])
    return out


def _refuse(g: Group, params: Tree, earlier: Sequence[Group]) -> None:
    paths = leaves_with_paths(params)
    for path, leaf in paths:
        if g.takes(path, leaf):
            before = next(e.name for e in earlier if e.takes(path, leaf))
            raise ValueError(f"groups.match={g.pattern!r} sets nothing: the earlier group {before!r} does, for {joined(path)}")
    near = nearest_path(g.pattern or "", [joined(path) for path, _ in paths])
    raise ValueError(f"groups.match={g.pattern!r} matches no parameter{near}")


def nearest_path(pattern: str, paths: Sequence[str]) -> str:
    """The end of an error: the path, or else the part of one, most like a pattern stripped of its operators."""
    plain = re.sub(r"[\^$()?*+|\\\[\]]", "", pattern)
    parts = list(dict.fromkeys(part for path in paths for part in path.split("/")))
    return suggestion(plain, paths) or suggestion(plain, parts) or f"; allowed: paths such as {', '.join(map(repr, paths[:3]))}"
