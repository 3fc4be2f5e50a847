"""Corpora: from files to tokens, in one order, split by what FACTS of the corpus say."""

from __future__ import annotations

import gzip
import hashlib
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.data.documents import Document, by_hash, by_position, read_documents, read_jsonl, read_text, residue
from research.data.text import corpus, text_corpora
from research.data.tokenizer import bytes_tokenizer, hf_tokenizer, narrowest


def test_files_come_in_the_order_of_their_relative_paths(texts):
    documents = read_text(str(texts / "**" / "*.txt"))
    assert [d.name for d in documents] == ["a/c.txt", "a/d.txt", "b.txt"]
    assert [d.content for d in documents] == [b"sea", b"dee\xff", b"bee\n"]
    several = read_text([str(texts / "b.txt"), str(texts / "a" / "*"), str(texts / "**" / "d.txt")])
    assert [d.name for d in several] == ["b.txt", "c.txt", "d.txt"]  # each file once, from the root of its pattern


def test_a_name_with_brackets_is_itself(texts):
    (texts / "x[1].txt").write_bytes(b"brackets")
    assert [d.content for d in read_text(str(texts / "x[1].txt"))] == [b"brackets"]


def test_relative_patterns_and_names_do_not_depend_on_the_folder_they_are_read_from(texts, monkeypatch):
    monkeypatch.chdir(texts)
    assert read_text("**/*.txt") == read_text(str(texts / "**" / "*.txt")) == read_text("../texts/**/*.txt")


def test_rows_of_jsonl_gz_and_parquet_are_documents(texts, tmp_path):
    rows = read_jsonl(str(tmp_path / "rows.jsonl"), "text")
    assert [(d.name, d.content) for d in rows] == [
        ("rows.jsonl:1", b"one"), ("rows.jsonl:2", b"two"), ("rows.jsonl:3", b"one"), ("rows.jsonl:4", b"")]  # fmt: skip
    packed = tmp_path / "PACKED.JSONL.GZ"
    packed.write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    assert [d.content for d in read_documents(str(packed), "text")] == [d.content for d in rows]
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["one", None, "zwei é"], "raw": [b"\xff", b"", b"b"]})
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=2)
    named = [(d.name, d.content) for d in read_documents(str(tmp_path / "rows.parquet"), "text")]
    assert named == [("rows.parquet:0", b"one"), ("rows.parquet:2", "zwei é".encode())]
    assert [d.content for d in read_documents(str(tmp_path / "rows.parquet"), "raw")] == [b"\xff", b"", b"b"]


def test_equal_rows_go_to_one_part_and_files_go_by_their_path(texts, tmp_path):
    rows = read_jsonl(str(tmp_path / "rows.jsonl"), "text")
    assert rows[0].key == rows[2].key == b"one"
    documents = [Document(f"f{i}.py", b"x", f"f{i}.py".encode()) for i in range(400)]
    parts = by_hash(documents)
    for document in documents:
        r = int(hashlib.sha256(document.name.encode()).hexdigest(), 16) % 20
        assert document in parts[{0: "test", 1: "validation"}.get(r, "train")]
        assert residue(document.key, 20) == r
    assert sum(map(len, parts.values())) == 400 and len(parts["test"]) > 5
    assert by_hash(documents[:100])["test"] == [d for d in parts["test"] if d in documents[:100]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=9).map(str.encode) | st.binary(max_size=9), min_size=1, max_size=6), st.floats(0, 0.4),
       st.floats(0, 0.4))  # fmt: skip
def test_a_split_by_position_loses_no_byte_and_cuts_no_character(contents, validation, test):
    documents = [Document(str(i), content, b"") for i, content in enumerate(contents)]
    parts = by_position(documents, validation, test)
    joined = {part: b"".join(d.content for d in held) for part, held in parts.items()}
    assert b"".join(joined.values()) == b"".join(contents)
    total = len(b"".join(contents))
    assert 0 <= len(joined["train"]) - (total - int(total * (validation + test))) <= 4
    if all(_is_utf8(content) for content in contents):
        assert all(_is_utf8(d.content) for held in parts.values() for d in held)


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_a_corpus_of_bytes_is_its_documents_joined(texts):
    held = corpus(read_text(str(texts / "**" / "*.txt")), bytes_tokenizer(), "some")
    assert held.tokens.tobytes() == b"seadee\xffbee\n" and held.tokens.dtype == np.uint8
    assert held.offsets.tolist() == [0, 3, 7, 11] and held.offsets.dtype == np.int64
    assert (held.bytes, held.vocab_size, held.start, held.bytes_per_token) == (11, 256, 10, 1.0)
    assert held.decode(held.tokens[3:7]) == b"dee\xff"
    assert held.documents == ("a/c.txt", "a/d.txt", "b.txt")


def test_a_separator_follows_every_document_and_counts(texts):
    held = corpus(read_text(str(texts / "**" / "*.txt")), bytes_tokenizer(), "some", b"\0")
    assert held.tokens.tobytes() == b"sea\0dee\xff\0bee\n\0" and held.bytes == 14


def test_the_fingerprint_of_a_corpus_is_its_content(texts):
    documents = read_text(str(texts / "**" / "*.txt"))

    def fingerprint(held, name="n"):
        return corpus(held, bytes_tokenizer(), name).fingerprint

    moved = [documents[0]._replace(content=b"se"), documents[1]._replace(content=b"adee\xff"), documents[2]]
    others = [fingerprint(documents[::-1]), fingerprint(documents[:2]), fingerprint(moved)]
    assert len({fingerprint(documents), *others}) == 4
    assert fingerprint(documents, "other") == fingerprint(documents)


def test_a_hugging_face_tokenizer_drops_and_pads_nothing(tokenizer_file):
    tokenizer = hf_tokenizer(tokenizer_file)
    assert (tokenizer.vocab_size, tokenizer.start) == (8, 4)  # start is the newline's token
    text = b"the cat sat the cat\n"  # ten tokens, where the file truncates to four
    ids = tokenizer.encode(text)
    assert ids.tolist() == [1, 5, 2, 5, 3, 5, 1, 5, 2, 4] and ids.dtype == np.uint8
    assert tokenizer.decode(ids) == text
    held = corpus([Document("d", "the é".encode(), b"")], tokenizer, "c")
    assert held.tokens.tolist() == [1, 5, 6] and held.bytes == 6 and held.bytes_per_token == 2.0


def test_tokens_are_as_narrow_as_the_vocabulary_allows():
    assert [narrowest(n) for n in (1, 256, 257, 65536, 65537)] == [np.uint8, np.uint8, np.uint16, np.uint16, np.uint32]


def test_corpora_of_a_users_own_files(texts, tmp_path, tokenizer_file):
    one = tmp_path / "input.txt"
    one.write_bytes(bytes(range(97, 117)) * 10)
    parts = text_corpora(str(one), tokenizer="bytes", split="position", fractions=(0.1, 0.2))
    assert {part: held.bytes for part, held in parts.items()} == {"train": 140, "validation": 20, "test": 40}
    for i in range(60):
        (texts / f"{i}.txt").write_text(f"the cat {i}")
    (texts / "a" / "d.txt").unlink()
    parts = text_corpora(str(texts / "**" / "*.txt"), tokenizer=str(tokenizer_file), split="document", separator="\n")
    assert sum(len(held.documents) for held in parts.values()) == 62
    assert all(held.tokens[held.offsets[1:] - 1].tolist() == [4] * len(held.documents) for held in parts.values())
    assert os.path.basename(parts["test"].documents[0]).endswith(".txt")


@given(st.binary(max_size=50))
def test_bytes_come_back_as_they_were(content):
    tokenizer = bytes_tokenizer()
    assert tokenizer.decode(tokenizer.encode(content)) == content
