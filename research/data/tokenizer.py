"""Text to numbers and back: bytes, or any Hugging Face `tokenizers` JSON file."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from research.data.determinism import digest
from research.data.errors import existing_file, reason

NEWLINE = ord("\n")


class Tokenizer(NamedTuple):
    """Text, as bytes, to token ids and back.

    encode_batch: documents (bytes each) -> one array [n] a document, unsigned and as narrow as vocab_size allows.
    decode: ids [n] -> bytes.
    vocab_size: ids are below it.
    start: the id that stands before the first token of a corpus: a newline's last token, so that a text begins as a line does
        and the vocabulary needs no id of its own for it. 0 where a newline has no token.
    needs_utf8: whether documents must be UTF-8.
    fingerprint: equal only for tokenizers that encode alike.
    """

    encode_batch: Callable[[Sequence[bytes]], list[np.ndarray]]
    decode: Callable[[Sequence[int] | np.ndarray], bytes]
    vocab_size: int
    start: int
    needs_utf8: bool
    fingerprint: str

    def encode(self, document: bytes) -> np.ndarray:
        """One document -> ids [n]."""
        return self.encode_batch([document])[0]


def narrowest(vocab_size: int) -> np.dtype:
    """uint8, uint16 or uint32, whichever first holds all ids below vocab_size."""
    return np.min_scalar_type(max(vocab_size - 1, 0))


def bytes_tokenizer() -> Tokenizer:
    """The 256 bytes; accepts anything."""
    return Tokenizer(
        encode_batch=lambda documents: [np.frombuffer(document, np.uint8) for document in documents],
        decode=lambda ids: np.asarray(ids).astype(np.uint8).tobytes(),
        vocab_size=256,
        start=NEWLINE,
        needs_utf8=False,
        fingerprint="bytes",
    )


def hf_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`. Special tokens are not added; truncation and padding that the file may ask for are
    switched off, since they would silently drop text. Decoding skips nothing.

    Raises ValueError (one line): no such file, not a tokenizer file, the `tokenizers` package is not installed; when
    encoding, what is not in a vocabulary that has no token for the unknown.
    """
    file = existing_file(path)
    try:
        import tokenizers
    except ImportError:
        raise ValueError(f"tokenizer {os.fspath(path)!r} needs the package tokenizers: pip install 'gnomon[text]'") from None
    with open(file, "rb") as handle:
        content = handle.read()
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the package raises plain Exception
        raise ValueError(f"{os.fspath(path)!r} is not a Hugging Face tokenizers JSON file: {reason(error)}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = [*tokenizer.get_vocab(with_added_tokens=True).values()]
    vocab_size = max(ids, default=-1) + 1  # get_vocab_size() counts ids, which may leave gaps
    dtype = narrowest(vocab_size)

    def encode_batch(documents: Sequence[bytes]) -> list[np.ndarray]:
        texts = [document.decode("utf-8") for document in documents]
        try:
            encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
        except Exception as error:
            raise ValueError(f"tokenizer {os.fspath(path)!r} cannot encode the text: {reason(error)}") from None
        return [np.asarray(e.ids, dtype) for e in encoded]

    def decode(tokens: Sequence[int] | np.ndarray) -> bytes:
        return tokenizer.decode([int(t) for t in tokens], skip_special_tokens=False).encode()

    try:
        newline = encode_batch([b"\n"])[0].tolist()
    except ValueError:  # it is not in the vocabulary, which has no token for the unknown either
        newline = []
    start = newline[-1] if newline else 0
    return Tokenizer(encode_batch, decode, vocab_size, start, needs_utf8=True, fingerprint=f"tokenizers {digest(content)}")
