"""Files that several tests read."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def tokenizer_file(tmp_path):
    """A word-level tokenizer JSON file, with truncation and padding switched on as published files often have it."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<unk>": 0, "the": 1, "cat": 2, "sat": 3, "\n": 4, " ": 5, "é": 6, "<pad>": 7}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\s"), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(pad_id=7, pad_token="<pad>", length=6)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture
def texts(tmp_path):
    """texts/{b.txt, a/c.txt, a/d.txt} and rows.jsonl."""
    folder = tmp_path / "texts"
    (folder / "a").mkdir(parents=True)
    (folder / "b.txt").write_bytes(b"bee\n")
    (folder / "a" / "c.txt").write_bytes(b"sea")
    (folder / "a" / "d.txt").write_bytes(b"dee\xff")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": t, "n": 1}) for t in ("one", "two", "one", "")) + "\n\n")
    return folder
