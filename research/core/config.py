"""Configs: Python files that return an `ml_collections.ConfigDict` of plain values, and overrides on the command line.

    load_config("configs/lm/stdlib.py:smoke", {"optimizer.learning_rate": "3e-4"})

Everything that can be told without building anything is told here, in one line: a missing file, an argument that the config
does not know, an unknown key, a wrong type.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.machinery
import importlib.util
import inspect
import json
import math
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from research.core.names import suggestion

PACKAGE = Path(__file__).resolve().parents[1]
REPO = PACKAGE.parent
# What holds configs/: the repository, or the package where a wheel put them. `from configs.base import base` finds them there.
HOLDER = PACKAGE if (PACKAGE / "configs").is_dir() else REPO


class ConfigError(ValueError):
    """A config, or an override of one, that cannot be. One line."""


def config_roots() -> list[Path]:
    """Where a config's path is looked up, in order: as given, then in the project or the installed package."""
    return [Path("."), HOLDER, HOLDER / "configs"]


def known_configs() -> list[str]:
    """Paths of the configs that come with the project, as `configs/lm/stdlib.py`."""
    found = sorted(p for p in (HOLDER / "configs").rglob("*.py") if p.stem not in ("base", "__init__"))
    return [p.relative_to(HOLDER).as_posix() for p in found]


def split_name(name: str) -> tuple[str, str]:
    """("path", "arg") of "path:arg"; the arg is "" where none is given."""
    path, colon, arg = name.rpartition(":")
    return (path, arg) if colon and path else (name, "")


def find(name: str) -> Path:
    """The file of a config given as `path[:arg]`, with or without ".py". ConfigError where there is none."""
    path = split_name(name)[0]
    for root in config_roots():
        for candidate in (root / path, root / f"{path}.py", root / path / "config.py"):
            if path and candidate.is_file():
                return candidate.resolve()
    near = suggestion(path, known_configs()) or suggestion(path, {Path(known).stem for known in known_configs()})
    raise ConfigError(f"--config {path}: no such file{near or '; see configs/'}")


def _faulty(path: Path, error: Exception) -> ConfigError:
    """A config file's own error in one line, with the line of the file that it came from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    place = f"{path}:{lines[-1]}" if lines else str(path)
    first = str(error).replace("\\n", "\n").splitlines()[:1]
    return ConfigError(f"--config {place}: {': '.join([type(error).__name__, *first])}")


def load_module(path: Path) -> ModuleType:
    """A config file as a module of its own, with its folder's name in front so that two may be called alike."""
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    loader = importlib.machinery.SourceFileLoader(f"gnomon_config_{path.stem}_{digest}", str(path))
    spec: Any = importlib.util.spec_from_loader(loader.name, loader)
    module = importlib.util.module_from_spec(spec)
    folders = [str(path.parent), str(HOLDER)]
    before = list(sys.path)
    sys.path[:0] = folders
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _faulty(path, error) from error
    finally:
        sys.path[:] = before
    if not callable(getattr(module, "get_config", None)):
        raise ConfigError(f'--config {path}: it has no get_config(arg="")')
    return module


def arguments(module: ModuleType) -> list[str]:
    """The args a config takes: its `ARGS` (a mapping or sequence of names); "smoke" where it does not say."""
    return sorted(getattr(module, "ARGS", ("smoke",)))


def load_config(name: str | Path, overrides: Mapping[str, Any] = MappingProxyType({}), **values: Any) -> FrozenConfigDict:
    """The config called `path[:arg]`, overridden, frozen.

    overrides: {"a.b": "text as on the command line"}. values: the same with Python values and "__" for ".":
    `load_config("lm/stdlib.py:smoke", train__steps=50)`. Raises ConfigError.
    """
    name = str(name)
    path, arg = find(name), split_name(name)[1]
    module = load_module(path)
    allowed = arguments(module)
    if arg and arg not in allowed:
        said = "" if hasattr(module, "ARGS") else f'; a config takes those that it lists: ARGS = ("{arg}", ...)'
        near = suggestion(arg, allowed)
        raise ConfigError(f"--config {name}: no argument {arg!r}; allowed: {', '.join(allowed)}{near}{said}")
    takes_argument = bool(inspect.signature(module.get_config).parameters)
    try:
        config = module.get_config(arg) if takes_argument else module.get_config()
    except Exception as error:
        raise _faulty(path, error) from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"--config {path}: get_config returned {type(config).__name__}; a ConfigDict is wanted")
    _check_leaves(config)
    config.lock()
    for key, text in dict(overrides).items():
        override(config, key, text)
    for key, value in values.items():
        override(config, key.replace("__", "."), value)
    return FrozenConfigDict(config)


def flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of a ConfigDict or mapping, in its order; an empty section is a leaf."""
    for key in config:
        if is_section(config[key]) and len(config[key]):
            yield from flat(config[key], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", {} if is_section(config[key]) else config[key]


def is_section(value: Any) -> bool:
    return isinstance(value, ConfigDict | FrozenConfigDict | Mapping)


def config_sha256(config: Any) -> str:
    """The hash of the resolved config, keys sorted."""
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()


def override(config: ConfigDict, key: str, value: Any) -> None:
    """Sets `config.a.b` for key "a.b" from text or a Python value. ConfigError on an unknown key or a wrong type."""
    section: Any = config
    *parents, name = key.split(".")
    allowed = [k for k, _ in flat(config)]
    for part in parents:
        section = section[part] if is_section(section) and part in section else None
    if not is_section(section) or name not in section:
        raise ConfigError(f"--config.{key}: no such key{suggestion(key, allowed) or '; see --print-config'}")
    if is_section(section[name]):
        if value == {} and not len(section[name]):
            return  # as `flat` gave it
        inner = ", ".join(f"{key}.{k}" for k in section[name])
        raise ConfigError(f"--config.{key} is a section; its keys: {inner}")
    section[name] = _converted(value, section[name], section.get_type(name), key)


def _converted(value: Any, old: Any, kind: type, key: str) -> Any:
    """`value`, text or not, as a `kind` like `old`."""

    def refuse(wanted: str) -> ConfigError:
        return ConfigError(f"--config.{key}={value!r}: {wanted} is wanted, as in {key}={old!r}")

    text = value if isinstance(value, str) else repr(value)
    if old is None and (value is None or text.lower() == "none"):
        return None
    if kind is str:
        if not isinstance(value, str):
            raise refuse("text")
        return value
    try:
        literal: Any = {"true": True, "false": False}.get(text.lower()) if kind is bool else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise refuse(_WANTED.get(kind, kind.__name__)) from None
    if kind is bool and isinstance(literal, bool):
        return literal
    number = isinstance(literal, int | float) and not isinstance(literal, bool)
    if number and math.isfinite(literal) and (kind is float or (kind is int and literal == int(literal))):
        return kind(literal)
    if kind in (tuple, list) and isinstance(literal, tuple | list):
        if kind is tuple and len(literal) != len(old):
            raise refuse(f"a tuple of {len(old)}")
        if old and any(type(x) is not type(old[0]) for x in literal):
            raise refuse(f"{kind.__name__} of {type(old[0]).__name__}")
        return kind(literal)
    raise refuse(_WANTED.get(kind, kind.__name__))


_WANTED = {int: "a whole number", float: "a number", bool: "true or false", tuple: "a tuple", list: "a list"}
_LEAVES = (bool, int, float, str, tuple, list)


def _check_leaves(config: ConfigDict, prefix: str = "") -> None:
    """Plain values only; a key without a value has a type (`placeholder(int)`), or anything at all could be put there."""
    for key in config:
        value, name = config[key], f"{prefix}{key}"
        if is_section(value):
            _check_leaves(value, f"{name}.")
        elif value is None and config.get_type(key) is type(None):
            raise ConfigError(
                f"config key {name} is None and of no type; write ml_collections.config_dict.placeholder(int), say"
            )
        elif value is not None and not isinstance(value, _LEAVES):
            raise ConfigError(
                f"config key {name} holds a {type(value).__name__}; allowed: numbers, text, tuples and lists of them"
            )


def parse_overrides(words: Sequence[str]) -> dict[str, str]:
    """{"a.b": "text"} from ["--config.a.b=text", ...] or ["--config.a.b", "text"]. ConfigError on any other word."""
    out, rest = {}, list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--config."):
            raise ConfigError(f"{word}: not understood; overrides are written --config.key=value")
        key, equals, text = word.removeprefix("--config.").partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{word}: a value is wanted, as in {word}=1")
            text = rest.pop(0)
        out[key] = text
    return out
