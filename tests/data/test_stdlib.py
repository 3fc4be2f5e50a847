"""The corpus of FACTS: Python's own library."""

from __future__ import annotations

import hashlib
import sys

import pytest

from research.data import stdlib

LEFT_OUT = ("test", "tests", "idle_test", "site-packages")


def test_the_split_is_the_published_rule():
    documents, parts = stdlib.documents(), stdlib.splits()
    names = [d.name for d in documents]
    assert names == sorted(names) and not any(part in LEFT_OUT for name in names for part in name.split("/"))
    for part, residues in (("test", {0}), ("validation", {1}), ("train", set(range(2, 20)))):
        chosen = [d for d in documents if int(hashlib.sha256(d.name.encode()).hexdigest(), 16) % 20 in residues]
        assert parts[part].documents == tuple(d.name for d in chosen)
        assert parts[part].tokens.tobytes() == b"".join(d.content for d in chosen)  # in path order
    assert {"json/decoder.py", "os.py", "this.py"} <= set(names)


@pytest.mark.skipif(sys.version_info[:3] != (3, 11, 7), reason="the counts are those of Python 3.11.7")
def test_the_sizes_are_the_published_ones():
    parts = stdlib.splits()
    assert len(stdlib.documents()) == 734
    assert round(sum(held.bytes for held in parts.values()) / 1e6, 1) == 12.1
    assert (len(parts["test"].documents), parts["test"].bytes) == (39, 655_776)


def test_only_source_outside_tests_counts(tmp_path):
    for name in ("os.py", "a/test/x.py", "a/tests/x.py", "site-packages/x.py", "idlelib/idle_test/x.py", "a/b.py", "a/b.pyc",
                 "a/test.py", "a/testing/c.py"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [d.name for d in stdlib.documents(str(tmp_path))] == ["a/b.py", "a/test.py", "a/testing/c.py", "os.py"]


def test_an_interpreter_without_source_is_told(tmp_path):
    (tmp_path / "os.pyc").write_bytes(b"")
    with pytest.raises(ValueError, match="ships no source of its standard library") as caught:
        stdlib.documents(str(tmp_path))
    assert "\n" not in str(caught.value)
