"""Configs: what is given wrongly is refused in one line that says what would be right."""

from __future__ import annotations

import json

import pytest

from research.core.config import (
    ConfigError,
    config_sha256,
    find,
    flat,
    known_configs,
    load_config,
    parse_overrides,
    split_name,
)

IMPORT = "from ml_collections import ConfigDict"
SOURCE = """
from ml_collections import ConfigDict, config_dict
ARGS = ("smoke", "big")
def get_config(arg=""):
    config = ConfigDict({"optimizer": {"name": "adam", "learning_rate": 1e-3}, "steps": 3, "flag": True, "pair": (1, 2)})
    config.names, config.size = ["a"], config_dict.placeholder(int)
    config.arg = arg
    return config
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(SOURCE)
    return str(file)


def test_a_config_outside_the_project_loads_with_its_argument(path):
    assert load_config(f"{path}:big").arg == "big"
    assert load_config(path).arg == ""


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("optimizer.learning_rate", "3e-4", 3e-4),
        ("optimizer.learning_rate", "1", 1.0),
        ("steps", "1e3", 1000),
        ("flag", "false", False),
        ("pair", "(3, 4)", (3, 4)),
        ("names", "['x', 'y']", ("x", "y")),
        ("names", "[]", ()),
        ("size", "7", 7),
        ("size", "none", None),
        ("optimizer.name", "3", "3"),
    ],
)
def test_text_becomes_the_type_that_the_key_has(path, key, text, value):
    got = dict(flat(load_config(path, {key: text})))[key]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "key, text, says",
    [
        ("optimizer.lerning_rate", "1", "no such key; nearest: 'optimizer.learning_rate'"),
        ("stepz", "1", "no such key; nearest: 'steps'"),
        ("steps", "1.5", "a whole number is wanted"),
        ("steps", "many", "a whole number is wanted"),
        ("steps", "true", "a whole number is wanted"),
        ("optimizer.learning_rate", "fast", "a number is wanted"),
        ("flag", "1", "true or false is wanted"),
        ("pair", "(1, 2, 3)", "a tuple of 2 is wanted"),
        ("pair", "(1, 'x')", "tuple of int is wanted"),
        ("names", "[1]", "list of str is wanted"),
        ("optimizer", "3", "is a section; its keys: optimizer.learning_rate, optimizer.name"),
        ("size", "big", "a whole number is wanted"),
        ("steps.more", "1", "no such key"),
    ],
)
def test_an_override_that_does_not_fit_is_one_line(path, key, text, says):
    with pytest.raises(ConfigError) as raised:
        load_config(path, {key: text})
    assert says in str(raised.value) and f"--config.{key}" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "source, says",
    [
        ("x = (", "SyntaxError"),
        ("import no_such_module\ndef get_config(arg=''): pass", "no_such_module"),
        ("x = 1", "no get_config"),
        ("def get_config(arg=''): return {'a': 1}", "a ConfigDict is wanted"),
        (f"{IMPORT}\ndef get_config(): return ConfigDict({{'a': None}})", "config key a is None"),
        (f"{IMPORT}\ndef get_config(): return ConfigDict({{'a': {{'b': print}}}})", "config key a.b holds"),
    ],
)
def test_a_file_that_is_no_config_is_one_line(tmp_path, source, says):
    file = tmp_path / "bad.py"
    file.write_text(source)
    with pytest.raises(ConfigError) as raised:
        load_config(str(file))
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_an_unknown_argument_and_a_missing_file_name_the_nearest(path):
    with pytest.raises(ConfigError, match=r"no argument 'smokee'; allowed: big, smoke; nearest: 'smoke'"):
        load_config(f"{path}:smokee")
    with pytest.raises(ConfigError, match=r"no such file; nearest: 'configs/lm/stdlib.py'"):
        find("configs/lm/stdlibb.py")


def test_a_file_that_lists_no_arguments_is_told_where_they_are_listed(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(f"{IMPORT}\ndef get_config(arg=''): return ConfigDict({{'a': 1}})")
    with pytest.raises(ConfigError, match=r"no argument 'big'; allowed: smoke; a config takes those that it lists: ARGS ="):
        load_config(f"{file}:big")


def test_a_config_is_frozen_and_its_hash_is_that_of_its_values(path):
    config = load_config(path)
    with pytest.raises(AttributeError):
        config.steps = 4
    assert config_sha256(config) == config_sha256(load_config(path))
    assert config_sha256(config) != config_sha256(load_config(path, {"steps": "4"}))


def test_python_values_override_too(path):
    assert load_config(path, optimizer__learning_rate=0.5, pair=(8, 9)).pair == (8, 9)


def test_overrides_are_read_with_and_without_an_equals_sign():
    assert parse_overrides(["--config.a.b=1", "--config.c", "x"]) == {"a.b": "1", "c": "x"}
    for words, says in ((["--confg.a=1"], "not understood"), (["--config.a"], "a value is wanted")):
        with pytest.raises(ConfigError, match=says):
            parse_overrides(words)


def test_names_split_at_the_last_colon_and_the_projects_configs_are_found():
    assert split_name("a/b.py:smoke") == ("a/b.py", "smoke") and split_name("a/b.py") == ("a/b.py", "")
    assert "configs/lm/stdlib.py" in known_configs()
    assert find("lm/stdlib") == find("configs/lm/stdlib.py")


@pytest.mark.parametrize("name", known_configs())
def test_a_config_flattened_overrides_itself_to_the_same(name):
    """As `evaluate` and `sample` do with the config that a run's folder holds."""
    plain = json.loads(json.dumps(load_config(name).to_dict()))
    assert load_config(name, dict(flat(plain))) == load_config(name)
