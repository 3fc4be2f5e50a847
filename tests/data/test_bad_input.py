"""Bad input is one line that names what was given, what is allowed, and the nearest match."""

from __future__ import annotations

import gzip
import lzma
import struct
import sys
import zlib

import numpy as np
import pytest

from research.data.arrays import array_source, read_npz, split_rows
from research.data.documents import read_documents, read_jsonl, read_parquet, read_text
from research.data.images import image_source, images_from_folders, images_from_idx, images_from_npz, read_idx
from research.data.mnist1d import mnist1d, mnist1d_sources
from research.data.streams import as_source, ordered_batches, subset, train_batches
from research.data.text import corpus, text_corpora
from research.data.tokenizer import bytes_tokenizer, hf_tokenizer
from research.data.windows import random_windows, scored_windows
from tests.data.test_images import idx

X, Y = np.zeros((4, 3, 3), np.uint8), np.zeros(4, np.uint8)
LIST = [{"x": np.float32(i)} for i in range(5)]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def train(records, batch_size=2, remainder="drop"):
    return train_batches(records, batch_size, seed=0, remainder=remainder)


def png(path, shape):
    pytest.importorskip("PIL.Image").fromarray(np.zeros(shape, np.uint8)).save(path)


def folders(t, second):
    (t / "i" / "cat").mkdir(parents=True)
    png(t / "i" / "cat" / "a.png", (4, 5))
    second(t / "i" / "cat" / "b.png")
    return images_from_folders(t / "i")


def short_corpus(t):
    return corpus(read_text(write(t / "s.txt", "seven b")), bytes_tokenizer(), "small")


def parquet(t, column, damage=lambda content: content):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": ["ab"] * 9, "number": [1] * 9})
    pytest.importorskip("pyarrow.parquet").write_table(table, t / "r.parquet", compression="none")
    return read_parquet(write(t / "r.parquet", damage((t / "r.parquet").read_bytes())), column)


def npz(t, damage):
    """Reads x of a.npz after `damage` to its bytes."""
    np.savez_compressed(t / "a.npz", x=np.arange(400.0), y=Y)
    return read_npz(write(t / "a.npz", damage((t / "a.npz").read_bytes())), ["x"])


def entry(offset, byte):
    """Damage to a zip file: another byte in what its directory says of the first entry."""

    def damage(content):
        at = content.index(b"PK\1\2") + offset
        return content[:at] + byte + content[at + 1 :]

    return damage


def word_level(t, text):
    """`text` in a vocabulary of words that has no token for the unknown."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 0})).save(str(t / "words.json"))
    return hf_tokenizer(t / "words.json").encode(text)


def large(t):
    """A PNG of a few bytes that says it is 60000 pixels wide and high."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">II", zlib.crc32(header), 9) + b"IDAT"
    return folders(t, lambda p: write(p, content))


def tiff(t, dtype):
    image = pytest.importorskip("PIL.Image").fromarray(np.zeros((4, 5), dtype))
    return folders(t, lambda p: image.save(p, format="TIFF"))


CASES = {
    "missing file": (
        lambda t: read_text(write(t / "corpus.txt", "x")[:-1]),
        ["no such file", "corpus.tx'", "nearest: 'corpus.txt'"],
    ),
    "missing folder": (
        lambda t: read_text(f"{t}/tets/a.txt") if (t / "text").mkdir() is None else 0,
        ["no 'tets'", "nearest: 'text'"],
    ),
    "glob of nothing": (
        lambda t: read_text(write(t / "a.txt", "x")[:-5] + "*.md"),
        ["*.md' matches no file", "nearest: 'a.txt'"],
    ),
    "glob in a missing folder": (lambda t: read_text(f"{t}/gone/*.md"), ["matches no file", "no such file", "gone"]),
    "no paths": (lambda t: read_text([]), ["paths: given none"]),
    "folder for a file": (lambda t: read_text(str(t)), ["is a folder", "**/*.txt"]),
    "empty corpus": (lambda t: corpus(read_text(write(t / "e.txt", "")), bytes_tokenizer(), "train"), ["'train' is empty"]),
    "empty files": (lambda t: text_corpora(write(t / "e.txt", ""), tokenizer="bytes", split="position"), ["empty corpus"]),
    "no documents": (lambda t: corpus([], bytes_tokenizer(), "train"), ["'train' is empty: no documents"]),
    "corpus shorter than a window": (lambda t: random_windows(short_corpus(t), 8, seed=0), ["given 8", "at most 7", "'small'"]),
    "context of a whole window": (lambda t: scored_windows(short_corpus(t), 4, 4), ["context: given 4", "0 to 3"]),
    "window of nothing": (lambda t: random_windows(short_corpus(t), 0, seed=0), ["length: given 0"]),
    "split without a part": (
        lambda t: text_corpora(write(t / "o.txt", "x"), tokenizer="bytes", split="document"),
        ["leaves nothing for", "split 'position'"],
    ),
    "unknown split": (
        lambda t: text_corpora(write(t / "o.txt", "x"), tokenizer="bytes", split="docs"),
        ["'docs'", "'document' or 'pos"],
    ),
    "fractions": (
        lambda t: text_corpora(write(t / "o.txt", "x" * 99), tokenizer="bytes", split="position", fractions=(0.5, 0.5)),
        ["validation 0.5 and test 0.5"],
    ),
    "mixed kinds": (
        lambda t: read_documents([write(t / "a.txt", "x"), write(t / "b.jsonl", "{}")], "text"),
        ["one kind of file"],
    ),
    "jsonl without a field named": (lambda t: read_documents(write(t / "b.jsonl", "{}")), ["field: none given", "b.jsonl"]),
    "field for text": (lambda t: read_documents(write(t / "a.txt", "x"), "text"), ["field: given 'text' for text files"]),
    "jsonl not JSON": (
        lambda t: read_jsonl(write(t / "b.jsonl", '{"text": "a"}\n\n{"text": '), "text"),
        ["b.jsonl:3", "not JSON"],
    ),
    "jsonl nested without end": (
        lambda t: read_jsonl(write(t / "b.jsonl", '{"text": "a"}\n' + "[" * 100_000), "text"),
        ["b.jsonl:2", "not JSON", "recursion"],
    ),
    "jsonl not UTF-8": (lambda t: read_jsonl(write(t / "b.jsonl", b'{"text": "\xff"}'), "text"), ["b.jsonl:1", "not JSON"]),
    "jsonl not an object": (lambda t: read_jsonl(write(t / "b.jsonl", "[1]"), "text"), ["b.jsonl:1", "given list"]),
    "jsonl without the field": (
        lambda t: read_jsonl(write(t / "b.jsonl", '{"texts": "a", "id": 1}'), "text"),
        ["b.jsonl:1", "no field 'text'", "nearest: 'texts'"],
    ),
    "jsonl of another type": (lambda t: read_jsonl(write(t / "b.jsonl", '{"text": 3}'), "text"), ["b.jsonl:1", "holds int"]),
    "jsonl.gz cut short": (
        lambda t: read_jsonl(write(t / "b.jsonl.gz", gzip.compress(b'{"text": "abc"}')[:-12]), "text"),
        ["b.jsonl.gz", "gzip"],
    ),
    "parquet without the column": (lambda t: parquet(t, "txt"), ["no column 'txt'", "nearest: 'text'"]),
    "parquet of another type": (lambda t: parquet(t, "number"), ["r.parquet:0", "holds int"]),
    "parquet of no UTF-8": (lambda t: parquet(t, "text", lambda c: c.replace(b"ab", b"\xff\xfe")), ["r.parquet", "damaged"]),
    "parquet of damaged pages": (
        lambda t: parquet(t, "text", lambda c: c[:4] + b"\xff" * 8 + c[12:]),
        ["r.parquet", "damaged one: ", "deserialize"],
    ),
    "parquet of a damaged directory": (
        lambda t: parquet(t, "text", lambda c: c[:-40] + b"\xff" * 30 + c[-10:]),
        ["r.parquet", "damaged one: "],
    ),
    "parquet that is none": (
        lambda t: read_parquet(write(t / "r.parquet", "text"), "text"),
        ["r.parquet", "not a parquet file"],
    ),
    "tokenizer file missing": (lambda t: hf_tokenizer(write(t / "tokenizer.json", "{}")[:-2]), ["nearest: 'tokenizer.json'"]),
    "tokenizer file that is none": (
        lambda t: hf_tokenizer(write(t / "tokenizer.json", "{}")),
        ["not a Hugging Face tokenizers JSON"],
    ),
    "words that no token is for": (lambda t: word_level(t, b"cat"), ["words.json' cannot encode", "UNK"]),
    "text that is packed": (
        lambda t: read_documents(write(t / "a.txt.xz", lzma.compress(b"text"))),
        ["paths: ", "a.txt.xz' is compressed", "unpack it"],
    ),
    "parquet that is packed": (
        lambda t: read_documents(write(t / "r.parquet.GZ", gzip.compress(b"text")), "text"),
        ["r.parquet.GZ' is compressed"],
    ),
    "truncated IDX": (
        lambda t: read_idx(write(t / "x", idx(X)[:-5])),
        ["truncated", "47 bytes given", "52 wanted", "uint8 (4, 3, 3)"],
    ),
    "truncated IDX header": (lambda t: read_idx(write(t / "x", idx(X)[:9])), ["truncated", "9 bytes given"]),
    "IDX too long": (lambda t: read_idx(write(t / "x", idx(X) + b"1")), ["too long", "53 bytes given", "52 wanted"]),
    "IDX of wrong magic": (lambda t: read_idx(write(t / "x", b"\x89PNG....")), ["not an IDX file", "89 50 4e 47"]),
    "IDX of wrong dtype": (lambda t: read_idx(write(t / "x", b"\0\0\x07\x01")), ["not an IDX file", "00 00 07 01"]),
    "IDX of nothing": (lambda t: read_idx(write(t / "x", b"")), ["not an IDX file"]),
    "IDX.gz cut short": (lambda t: read_idx(write(t / "x.gz", gzip.compress(idx(X))[:-9])), ["x.gz", "truncated or damaged"]),
    "IDX missing": (lambda t: read_idx(write(t / "train", idx(X)) + "s"), ["no such file", "nearest: 'train'"]),
    "IDX folder": (lambda t: read_idx(t), ["is a folder"]),
    "labels for images": (
        lambda t: images_from_idx(write(t / "x", idx(Y)), write(t / "y", idx(Y))),
        ["images: uint8", "uint8 (4,)"],
    ),
    "images for labels": (lambda t: images_from_idx(write(t / "x", idx(X)), write(t / "y", idx(X))), ["labels: integers"]),
    "images and labels unequal": (
        lambda t: images_from_idx(write(t / "x", idx(X)), write(t / "y", idx(Y[:3]))),
        ["x' and ", "y': images and labels: given 4 images and 3 labels"],
    ),
    "no images": (lambda t: image_source(X[:0], Y[:0]), ["images: given none"]),
    "negative labels": (lambda t: image_source(X, Y.astype(int) - 1), ["labels: given -1"]),
    "labels past int32": (lambda t: image_source(X, Y.astype(int) + 2**32), ["labels: given 4294967296", "to 2147483647"]),
    "float images": (lambda t: image_source(X / 1.0, Y), ["images: uint8", "float64"]),
    "std of another number": (lambda t: image_source(X, Y, std=[1, 2, 3]), ["std: given 3 numbers for 1 channels"]),
    "std of zero": (lambda t: image_source(X, Y, std=0.0), ["std: given 0.0"]),
    "image sizes": (lambda t: folders(t, lambda p: png(p, (4, 6))), ["b.png' is 4x6", "a.png' 4x5"]),
    "image damaged": (lambda t: folders(t, lambda p: write(p, "PNG")), ["b.png' cannot be read"]),
    "image too large": (large, ["b.png' cannot be read", "decompression bomb"]),
    "image of 32 bits": (lambda t: tiff(t, np.int32), ["b.png' cannot be read", "8 or 16 bits", "mode 'I'"]),
    "image of floats": (lambda t: tiff(t, np.float32), ["b.png' cannot be read", "8 or 16 bits", "mode 'F'"]),
    "image folder missing": (lambda t: images_from_folders(t / "imgs"), ["no such file", "imgs"]),
    "image folder without classes": (lambda t: images_from_folders(t), ["no class folders"]),
    "class without images": (lambda t: images_from_folders(t) if (t / "cat").mkdir() is None else 0, ["cat' holds no images"]),
    "channels": (lambda t: images_from_folders(t, 2), ["channels: given 2", "1, 3, 4"]),
    "npz missing": (lambda t: read_npz(t / "a.npz", ["x"]), ["no such file"]),
    "npz that is none": (lambda t: read_npz(write(t / "a.npz", "x"), ["x"]), ["not an npz file"]),
    "npz without the array": (
        lambda t: np.savez(t / "a.npz", inputs=X) or read_npz(t / "a.npz", ["input"]),
        ["no array 'input'", "nearest: 'inputs'"],
    ),
    "npz of objects": (
        lambda t: np.savez(t / "a.npz", x=np.asarray([{}])) or read_npz(t / "a.npz", ["x"]),
        ["a.npz' cannot", "Object"],
    ),
    "npz cut short": (lambda t: npz(t, lambda c: c[:150] + c[-300:]), ["a.npz' cannot be read: "]),
    "npz of damaged values": (lambda t: npz(t, lambda c: c[:70] + b"\xff" * 40 + c[110:]), ["a.npz' cannot be read: "]),
    "npz of a damaged directory": (lambda t: npz(t, entry(0, b"p")), ["a.npz' cannot be read: ", "directory"]),
    "npz packed unknown": (lambda t: npz(t, entry(10, b"\x63")), ["a.npz' cannot be read: ", "compression method"]),
    "npz images of floats": (
        lambda t: np.savez(t / "a.npz", x=X / 1.0, y=Y) or images_from_npz(t / "a.npz", "x", "y"),
        ["a.npz': images: uint8", "float64 (4, 3, 3)"],
    ),
    "npz images without labels": (
        lambda t: np.savez(t / "a.npz", x=X) or images_from_npz(t / "a.npz", "x", "y"),
        ["no array 'y'"],
    ),
    "arrays unequal": (lambda t: array_source({"x": X, "y": Y[:3]}), ["arrays of one length", "x (4, 3, 3), y (3,)"]),
    "arrays of scalars": (lambda t: array_source({"x": np.float32(1)}), ["arrays of one length", "x ()"]),
    "arrays of text": (lambda t: array_source({"x": np.asarray(["a"])}), ["array 'x'", "dtype <U1"]),
    "arrays past int32": (lambda t: array_source({"x": np.asarray([2**40])}), ["array 'x'", "int32 does not"]),
    "no arrays": (lambda t: array_source({}), ["arrays: given none"]),
    "empty arrays": (lambda t: array_source({"x": X[:0]}), ["hold no records"]),
    "batch larger than the data": (lambda t: train(LIST, 6), ["batch_size: given 6", "at most 5"]),
    "batch of nothing": (lambda t: ordered_batches(LIST, 0), ["batch_size: given 0"]),
    "unknown remainder": (lambda t: train(LIST, 2, "keep"), ["remainder: given 'keep'", "'drop' or 'pad'"]),
    "rows of a batch beyond": (lambda t: train(LIST, 2).rows(1, 3), ["rows: given 1 to 3", "0 to 2"]),
    "arrays for records": (lambda t: train({"x": X}), ["a dict of 'x'", "array_source"]),
    "no records": (lambda t: train([]), ["holds no records"]),
    "records that are none": (lambda t: train([1, 2]), ["record 0 is a int"]),
    "records of unequal shape": (
        lambda t: next(ordered_batches([{"x": np.zeros(2)}, {"x": np.zeros(3)}], 2).open()),
        ["record 1: 'x' has shape (3,)", "(2,)"],
    ),
    "records of unequal names": (lambda t: next(ordered_batches([{"x": 1}, {"y": 1}], 2).open()), ["do not both hold 'x'"]),
    "rows beyond": (lambda t: subset(LIST, [0, 5]), ["rows: given 0 to 5", "0 to 4"]),
    "no rows": (lambda t: subset(LIST, []), ["rows: given none"]),
    "position beyond the end": (lambda t: ordered_batches(LIST, 2).position(4), ["given step 4", "0 to 3"]),
    "position before the beginning": (lambda t: train(LIST).position(-1), ["given step -1"]),
    "everything held out": (lambda t: split_rows(5, 1.0 - 1e-9, seed=0), ["holds out 5 of 5"]),
    "mnist1d of nothing": (lambda t: mnist1d(samples=9), ["given 9 samples"]),
    "mnist1d of no probability": (lambda t: mnist1d(label_noise=1.5), ["data.label_noise=1.5 must be 0 to 1"]),
    "mnist1d of no seed": (lambda t: mnist1d_sources(seed=-1), ["data.seed=-1", "0 to 4294967295"]),
    "endless source": (lambda t: as_source(type("S", (), {"__len__": lambda s: sys.maxsize})()), ["repeats without end"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_with_what_helps(case, tmp_path):
    make, fragments = CASES[case]
    with pytest.raises(ValueError) as caught:
        make(tmp_path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    for fragment in fragments:
        assert fragment in message


def test_text_that_is_not_utf8_names_file_and_offset(texts, tokenizer_file):
    with pytest.raises(ValueError) as caught:
        text_corpora(str(texts / "**" / "*.txt"), tokenizer=str(tokenizer_file), split="position", fractions=(0.2, 0.3))
    assert "'a/d.txt' is not UTF-8: byte 3 is 0xff" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("package, make", [
    ("tokenizers", lambda t: hf_tokenizer(write(t / "tokenizer.json", "{}"))),
    ("pyarrow", lambda t: read_parquet(write(t / "r.parquet", "x"), "text")),
])  # fmt: skip
def test_a_missing_package_is_one_line_naming_the_extra(package, make, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"needs the package {package}: pip install 'gnomon\[text\]'"):
        make(tmp_path)


def test_a_missing_pillow_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    (tmp_path / "cat").mkdir()
    write(tmp_path / "cat" / "a.png", "x")
    with pytest.raises(ValueError, match="needs the package pillow"):
        images_from_folders(tmp_path)
