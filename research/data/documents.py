"""Documents from files: text by globs, jsonl, parquet; in one order on every machine; and their split into three parts."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from research.data.errors import nearest, no_such_file, reason

Paths = str | Sequence[str]
Parts = dict[str, list["Document"]]

JSONL = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
PARQUET = (".parquet",)
PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".7z", ".tar", ".tgz")


class Document(NamedTuple):
    """name: its path from the root of its pattern, with the line or row in a table; content: its bytes; key: what `by_hash`
    hashes, which is the relative path of a file, and the content of a row, so that equal rows go to one part."""

    name: str
    content: bytes
    key: bytes


def found_files(paths: Paths) -> list[tuple[str, str]]:
    """[(path relative to the fixed part of its pattern, as POSIX text; path to open)], sorted by the former, each file once.

    `**` goes through folders, `~` is the home. Raises ValueError for a pattern that matches no file, or a folder.
    """
    found: dict[str, tuple[str, int, str]] = {}
    patterns = [paths] if isinstance(paths, str) else list(paths)
    if not patterns:
        raise ValueError("paths: given none, a file name or a pattern such as 'texts/**/*.txt' is wanted")
    for number, pattern in enumerate(patterns):
        expanded = os.path.expanduser(pattern)
        if os.path.isdir(expanded):
            raise ValueError(
                f"paths: {pattern!r} is a folder, a pattern such as {os.path.join(pattern, '**', '*.txt')!r} is wanted"
            )
        # A name that exists is meant literally, brackets and all.
        literal = os.path.isfile(expanded)
        root = os.path.dirname(expanded) if literal else _root(expanded)
        files = [expanded] if literal else [f for f in glob.iglob(expanded, recursive=True) if os.path.isfile(f)]
        if not files:
            what = f"paths: {pattern!r} matches no file" if glob.has_magic(expanded) else f"paths: {no_such_file(pattern)}"
            raise ValueError(what + (_nearby(expanded, root) if glob.has_magic(expanded) else ""))
        for file in files:
            relative = os.path.relpath(file, root or ".").replace(os.sep, "/")
            found.setdefault(os.path.realpath(file), (relative, number, file))
    return [(relative, file) for relative, _, file in sorted(found.values())]


def _root(pattern: str) -> str:
    """The folder before the first part with a wildcard."""
    folder = os.path.dirname(pattern)
    while glob.has_magic(folder):
        folder = os.path.dirname(folder)
    return folder


def _nearby(pattern: str, root: str) -> str:
    if not os.path.isdir(root or "."):
        return f"; {no_such_file(root)}"
    return nearest(os.path.relpath(pattern, root or "."), os.listdir(root or "."))


def read_text(paths: Paths) -> list[Document]:
    """One document a file, whatever bytes it holds."""
    return [Document(name, content, name.encode()) for name, content in _contents(found_files(paths))]


def _contents(files: Sequence[tuple[str, str]]) -> Iterator[tuple[str, bytes]]:
    for name, file in files:
        with open(file, "rb") as handle:
            yield name, handle.read()


def read_jsonl(paths: Paths, field: str) -> list[Document]:
    """One document a line: the string at `field` of its JSON object. Blank lines are skipped; names ending in .gz are unpacked.

    Raises ValueError naming file and line: not JSON, not an object, without the field (nearest field), or not a string there.
    """
    documents = []
    for name, file in found_files(paths):
        for number, line in enumerate(_lines(file), start=1):
            if line.strip():
                text = _field_of(line, field, f"{file}:{number}")
                documents.append(_row(f"{name}:{number}", text))
    return documents


def _lines(file: str) -> Iterator[bytes]:
    with gzip.open(file, "rb") if file.lower().endswith(".gz") else open(file, "rb") as handle:
        try:
            yield from handle
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{file!r} is not an intact gzip file: {error}") from None


def _field_of(line: bytes, field: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a JSON object is wanted, given {type(row).__name__}")
    if field not in row:
        raise ValueError(f"{where}: no field {field!r}{nearest(field, row)}")
    if not isinstance(row[field], str):
        raise ValueError(f"{where}: field {field!r} holds {type(row[field]).__name__}, a string is wanted")
    return row[field]


def read_parquet(paths: Paths, column: str) -> list[Document]:
    """One document a row: the string (or binary) of `column`; null rows are skipped.

    Raises ValueError: not a parquet file or a damaged one, no such column (nearest), another type, or the package pyarrow is
    not installed.
    """
    files = found_files(paths)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{files[0][1]!r} needs the package pyarrow: pip install 'gnomon[text]'") from None
    documents = []
    for name, file in files:
        try:
            with pyarrow.parquet.ParquetFile(file) as table:
                for row, value in enumerate(_values(table, file, column)):
                    if not isinstance(value, str | bytes | None):
                        raise ValueError(f"{file}:{row}: column {column!r} holds {type(value).__name__}, text is wanted")
                    if value is not None:
                        documents.append(_row(f"{name}:{row}", value))
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file!r} is not a parquet file, or a damaged one: {reason(error)}") from None
    return documents


def _values(table: Any, file: str, column: str) -> Iterator[Any]:
    if column not in table.schema_arrow.names:
        raise ValueError(f"{file!r}: no column {column!r}{nearest(column, table.schema_arrow.names)}")
    for batch in table.iter_batches(columns=[column]):
        yield from batch.column(0).to_pylist()


def _row(name: str, text: str | bytes) -> Document:
    # A JSON string may hold lone surrogates, which no UTF-8 has.
    content = text.encode("utf-8", errors="replace") if isinstance(text, str) else text
    return Document(name, content, content)


def read_documents(paths: Paths, field: str | None = None) -> list[Document]:
    """By the files' endings: .jsonl, .ndjson (.gz or not) and .parquet, for which `field` names what to read, else text.

    Raises ValueError: kinds mixed, files packed otherwise, field missing or given for text, and what the readers raise.
    """
    files = [file for _, file in found_files(paths)]
    readers = {_reader(file): file for file in files}
    if len(readers) > 1:
        raise ValueError(f"paths: one kind of file is wanted, given {' and '.join(map(repr, list(readers.values())[:2]))}")
    reader = next(iter(readers))
    if reader is read_text:
        if field is not None:
            raise ValueError(f"field: given {field!r} for text files such as {files[0]!r}; it is for jsonl and parquet")
        return read_text(paths)
    if field is None:
        raise ValueError(f"field: none given for {files[0]!r}; the field (column) that holds the text is wanted")
    return reader(paths, field)


def _reader(file: str) -> Callable[..., list[Document]]:
    lower = file.lower()
    if lower.endswith(JSONL):
        return read_jsonl
    if lower.endswith(PACKED):
        raise ValueError(f"paths: {file!r} is compressed or an archive; unpack it first (of these only .jsonl.gz is read)")
    return read_parquet if lower.endswith(PARQUET) else read_text


def residue(key: bytes, modulus: int) -> int:
    """sha256(key), as a big-endian number, modulo `modulus`."""
    return int.from_bytes(hashlib.sha256(key).digest(), "big") % modulus


def by_hash(documents: Sequence[Document], modulus: int = 20) -> Parts:
    """{"train", "validation", "test"}: residue 0 of a document's key is test, 1 validation, the rest training. The order stays,
    and a document's part does not depend on what other documents there are."""
    parts: Parts = {"train": [], "validation": [], "test": []}
    for document in documents:
        parts[{0: "test", 1: "validation"}.get(residue(document.key, modulus), "train")].append(document)
    return parts


def by_position(documents: Sequence[Document], validation: float = 0.05, test: float = 0.05) -> Parts:
    """{"train", "validation", "test"}: the first, next and last bytes of the documents one after another, the latter two parts
    by the given fractions. For a corpus of one or few files. A cut moves on to the next UTF-8 character.

    Raises ValueError for fractions below 0 or that leave nothing to train on.
    """
    if validation < 0 or test < 0 or validation + test >= 1:
        raise ValueError(
            f"split: given validation {validation} and test {test}, each at least 0 and below 1 together are allowed"
        )
    total = sum(len(document.content) for document in documents)
    cuts = [total - int(total * (validation + test)), total - int(total * test)]
    parts: Parts = {"train": [], "validation": [], "test": []}
    begin = 0
    for document in documents:
        content, inner = document.content, [0]
        for cut in cuts:
            inner.append(max(inner[-1], _at_character(content, min(max(cut - begin, 0), len(content)))))
        inner.append(len(content))
        for part, first, last in zip(parts, inner, inner[1:], strict=False):
            if last > first or (not content and part == "train"):
                parts[part].append(document._replace(content=content[first:last]))
        begin += len(content)
    return parts


def _at_character(content: bytes, cut: int) -> int:
    """The first place from `cut` on that is not inside a UTF-8 character (4 bytes at most); `cut` where there is none."""
    if not cut:  # a document's beginning is no place inside a character
        return cut
    ends = [place for place in range(cut, min(cut + 4, len(content))) if content[place] & 0xC0 != 0x80]
    return ends[0] if ends else len(content) if cut + 4 > len(content) else cut
