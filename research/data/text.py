"""A corpus: documents as one array of tokens, with what bits per byte need."""

from __future__ import annotations

import builtins
import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from research.data.determinism import digest
from research.data.documents import Document, Paths, by_hash, by_position, read_documents
from research.data.tokenizer import Tokenizer, bytes_tokenizer, hf_tokenizer, narrowest

SPLITS = {"document": by_hash, "position": by_position}
CHUNK = 256  # documents encoded at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Documents one after another, in their order.

    tokens: [n] uint8, uint16 or uint32, as narrow as the vocabulary allows.
    offsets: int64 [documents + 1]; document i is tokens[offsets[i]:offsets[i + 1]].
    documents: their names.
    bytes: of all documents before they were tokenized, separators included: what bits per byte divide by.
    """

    name: str
    tokens: np.ndarray
    offsets: np.ndarray
    documents: tuple[str, ...]
    bytes: int
    tokenizer: Tokenizer

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal only for equal tokens, offsets and tokenizer; the name does not count."""
        content = digest(self.tokens, self.offsets, self.tokenizer.fingerprint)
        return f"corpus tokens={len(self.tokens)} bytes={self.bytes} {content}"

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def start(self) -> int:
        """The id that stands before the first token (see `Tokenizer`)."""
        return self.tokenizer.start

    @property
    def bytes_per_token(self) -> float:
        """Bits per byte are nats per token / (ln 2 * this)."""
        return self.bytes / len(self.tokens)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> builtins.bytes:  # `bytes` is a field here
        """ids [n] -> the bytes they stand for."""
        return self.tokenizer.decode(tokens)


def corpus(documents: Sequence[Document], tokenizer: Tokenizer, name: str, separator: bytes = b"") -> Corpus:
    """Tokenizes documents one by one, each followed by `separator` (tokenized and counted with it), and joins them in order.

    Raises ValueError: no documents, nothing but empty ones, or a document that the tokenizer needs as UTF-8 and is not
    (document and byte offset are named).
    """
    if not documents:
        raise ValueError(f"corpus {name!r} is empty: no documents")
    if tokenizer.needs_utf8:
        _check_utf8(documents)
    pieces: list[np.ndarray] = []
    for first in range(0, len(documents), CHUNK):
        pieces += tokenizer.encode_batch([document.content + separator for document in documents[first : first + CHUNK]])
    offsets = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
    if not offsets[-1]:
        raise ValueError(f"corpus {name!r} is empty: its {len(documents)} documents hold nothing")
    tokens = np.concatenate(pieces).astype(narrowest(tokenizer.vocab_size), copy=False)
    tokens.setflags(write=False)
    size = sum(len(document.content) + len(separator) for document in documents)
    return Corpus(name, tokens, offsets, tuple(document.name for document in documents), size, tokenizer)


def _check_utf8(documents: Sequence[Document]) -> None:
    for document in documents:
        try:
            document.content.decode("utf-8")
        except UnicodeDecodeError as error:
            place = f"byte {error.start} is {document.content[error.start]:#04x}"
            raise ValueError(
                f"{document.name!r} is not UTF-8: {place}; this tokenizer needs UTF-8 (tokenizer 'bytes' takes any bytes)"
            ) from None


def tokenizer_named(name: str) -> Tokenizer:
    """`"bytes"`, or the path of a Hugging Face `tokenizers` JSON file."""
    return bytes_tokenizer() if name == "bytes" else hf_tokenizer(name)


def text_corpora(
    paths: Paths,
    *,
    tokenizer: str,
    split: str,
    field: str | None = None,
    separator: str = "",
    modulus: int = 20,
    fractions: tuple[float, float] = (0.05, 0.05),
) -> dict[str, Corpus]:
    """{"train", "validation", "test"}: corpora of a user's own files.

    Args:
      paths: file names or patterns (`**` allowed) of text, jsonl or parquet files.
      tokenizer: "bytes", or the path of a Hugging Face `tokenizers` JSON file.
      split: "document": by the sha256 of the relative path (of a row's content in jsonl and parquet) modulo `modulus`: 0 is
        test, 1 validation, the rest training. "position": the last `fractions` of all bytes are validation and test.
      field: what holds the text of a jsonl object or a parquet row; None for text files.
      separator: put after every document, and counted with it.

    Raises ValueError (one line): whatever the readers and `corpus` raise, and a part that is left empty.
    """
    if split not in SPLITS:
        raise ValueError(f"split: given {split!r}, allowed {' or '.join(map(repr, SPLITS))}")
    chosen = tokenizer_named(tokenizer)
    documents = read_documents(paths, field)
    if not any(document.content for document in documents):
        raise ValueError(f"empty corpus: the {len(documents)} documents of {paths!r} hold no text")
    if chosen.needs_utf8:  # while the offset is still that in the file
        _check_utf8(documents)
    parts = by_hash(documents, modulus) if split == "document" else by_position(documents, *fractions)
    for part, held in parts.items():
        if not any(document.content for document in held):
            advice = "; split 'position' cuts by bytes instead" if split == "document" else ""
            raise ValueError(f"split {split!r} leaves nothing for {part}: {len(documents)} documents in all{advice}")
    return {part: corpus(held, chosen, part, separator.encode()) for part, held in parts.items()}
