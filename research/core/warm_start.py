"""Starting from the variables of another run: leaves matched by path, renamed where asked, the rest as initialized."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from research.core.names import suggestion
from research.core.tree import joined, leaves_with_paths, map_with_path
from research.core.types import Variables


class Matched(NamedTuple):
    """variables: shaped as the initial ones. taken, kept: paths that came from the other run, and that stayed as initialized.
    unused: paths of the other run that were not taken, with the reason."""

    variables: Variables
    taken: list[str]
    kept: list[str]
    unused: dict[str, str]

    def __str__(self) -> str:
        lines = [f"warm start: {len(self.taken)} arrays taken, {len(self.kept)} kept as initialized, {len(self.unused)} unused"]
        lines += [f"  kept    {path}" for path in self.kept]
        lines += [f"  unused  {path}: {why}" for path, why in self.unused.items()]
        return "\n".join(lines)


def matched(
    initial: Variables, loaded: Variables, rename: Sequence[tuple[str, str]] = (), groups: Sequence[str] = ("params", "state")
) -> Matched:
    """`initial`, with every leaf of `loaded` that has its path and shape.

    rename: (regular expression, replacement) pairs, applied in order to loaded paths, such as ("params/encoder/", "params/").
    groups: which of params, state and frozen are taken. Dtypes become the initial ones.
    Raises ValueError where a rename matches nothing, where two leaves get one path, or where nothing is taken at all.
    """
    source: dict[str, Any] = {}
    used = {pattern: False for pattern, _ in rename}
    for pattern, _ in rename:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"warm start: the pattern {pattern!r} is no regular expression: {error}") from error
    for path, leaf in leaves_with_paths({g: loaded[g] for g in groups}):
        name = joined(path)
        for pattern, replacement in rename:
            new = re.sub(pattern, replacement, name)
            used[pattern] |= new != name
            name = new
        if name in source:
            raise ValueError(f"warm start: two arrays are renamed to {name}")
        source[name] = leaf
    for pattern in (p for p, hit in used.items() if not hit):
        raise ValueError(f"warm start: rename {pattern!r} matches no path{suggestion(pattern, source)}")
    wanted = {joined(p): x for p, x in leaves_with_paths(initial)}
    fits = {name for name, x in source.items() if name in wanted and wanted[name].shape == x.shape}
    if not fits:
        raise ValueError(f"warm start: none of {len(source)} arrays fits; the first is {next(iter(source), 'not there')}")
    unused = {
        name: f"shape {x.shape}, wanted {wanted[name].shape}" if name in wanted else "no such path"
        for name, x in source.items()
        if name not in fits
    }
    variables = map_with_path(
        lambda path, x: jnp.asarray(source[joined(path)], x.dtype) if joined(path) in fits else x, initial
    )
    return Matched(variables, sorted(fits), sorted(set(wanted) - fits), unused)


def warm_start(
    init: Callable[[Any], Variables], load: Callable[[], Variables], tell: Callable[[str], None], **options: Any
) -> Callable[[Mapping[str, Any] | None, Any], Variables]:
    """A Stage's `enter` that begins from `load()`, matched with `init(key)`, options as `matched`; `tell` gets the report."""

    def enter(before: Mapping[str, Any] | None, key: Any) -> Variables:
        found = matched(init(key), load(), **options)
        tell(str(found))
        return found.variables

    return enter
