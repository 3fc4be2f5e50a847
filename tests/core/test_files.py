"""Files that are whole or not there, and seals that see every change."""

from __future__ import annotations

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

from research.core import files


def test_plain_is_json_that_any_reader_takes():
    value = {"a": np.float32(0.5), "b": (1, np.int64(2)), "c": jnp.arange(2.0).astype(jnp.bfloat16), "d": float("nan"), 3: None}
    text = files.json_bytes(value | {"e": np.array([[1.0, np.inf]]), "f": True})

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(text, parse_constant=refuse) == {
        "a": 0.5, "b": [1, 2], "c": [0.0, 1.0], "d": None, "3": None, "e": [[1.0, None]], "f": True,
    }  # fmt: skip


def test_what_is_no_json_is_refused_by_type():
    with pytest.raises(ValueError, match="type set is no JSON value"):
        files.json_bytes({"a": {1}})


def test_a_failed_write_leaves_the_old_content_and_names_the_path(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_whole(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: .*a.json"):
        files.write_whole(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_seal_sees_every_byte_and_every_file(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    contents = {"a": b"hello", "deep/b": b"", "deep/er/c": bytes(range(256))}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    files.seal(tmp_path)
    assert files.damage(tmp_path) is None
    for name, data in contents.items():
        for changed in [data + b"x", data[:-1], *(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :] for i in range(len(data)))]:
            if changed != data:
                (tmp_path / name).write_bytes(changed)
                assert str(tmp_path / name) in files.damage(tmp_path)
        (tmp_path / name).unlink()
        assert files.damage(tmp_path) == f"{tmp_path / name} is missing"
        (tmp_path / name).write_bytes(data)
    assert files.damage(tmp_path) is None


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b'{"files": {"a": {}}}', b'{"files": 3}', b"\xff\xfe"])
def test_a_manifest_that_is_none_is_damage(tmp_path, text):
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / files.MANIFEST).write_bytes(text)
    assert str(tmp_path / files.MANIFEST) in files.damage(tmp_path)


def test_a_missing_manifest_is_damage(tmp_path):
    assert files.damage(tmp_path) == f"{tmp_path / files.MANIFEST} is missing"
