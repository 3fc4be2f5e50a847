"""Trees by path: paths are tuples of str, printed with slashes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax

Path = tuple[str, ...]


def path_of(entries: Iterable[Any]) -> Path:
    """The str path of a jax key path: dict keys, attribute names and indices alike."""
    return tuple(str(getattr(e, "key", getattr(e, "name", getattr(e, "idx", e)))) for e in entries)


def leaves_with_paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[Path, Any]]:
    """[(path, leaf)] in jax's own order."""
    return [(path_of(p), x) for p, x in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]]


def map_with_path(f: Callable[..., Any], tree: Any, *rest: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """`f(path, leaf, *leaves)` over the tree, path as a tuple of str."""
    return jax.tree_util.tree_map_with_path(lambda p, *xs: f(path_of(p), *xs), tree, *rest, is_leaf=is_leaf)


def nested(flat: Iterable[tuple[Path, Any]]) -> dict[str, Any]:
    """Nested dicts from (path, leaf) pairs."""
    out: dict[str, Any] = {}
    for path, leaf in flat:
        node = out
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return out


def joined(path: Path) -> str:
    return "/".join(path)
