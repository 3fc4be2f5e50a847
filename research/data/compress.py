"""What general compressors make of a corpus, in bits per byte: the yardstick of a language model of bytes."""

from __future__ import annotations

import bz2
import gzip
import lzma
from concurrent.futures import ThreadPoolExecutor

XZ = {"format": lzma.FORMAT_XZ, "check": lzma.CHECK_NONE, "preset": 9 | lzma.PRESET_EXTREME}


def compressed_bits_per_byte(content: bytes, others: bytes = b"") -> dict[str, float]:
    """{compressor: 8 * compressed size / size} of `content`, each at its strongest setting.

    "xz -9e, primed" is what `content` adds to the size of `others` when both are compressed as one stream; its window of 64 MiB
    must hold both for the priming to be whole. Left out where `others` is empty. Raises ValueError on empty content.
    """
    if not content:
        raise ValueError("nothing to compress: the content is empty")

    def xz(data: bytes) -> int:
        return len(lzma.compress(data, **XZ))

    with ThreadPoolExecutor() as pool:  # the compressors release the interpreter's lock
        sizes = {
            "gzip -9": pool.submit(lambda: len(gzip.compress(content, 9, mtime=0))),
            "bz2 -9": pool.submit(lambda: len(bz2.compress(content, 9))),
            "xz -9e": pool.submit(xz, content),
        }
        both, alone = (pool.submit(xz, data) if others else None for data in (others + content, others))
        found = {name: job.result() for name, job in sizes.items()}
        if both and alone:
            found["xz -9e, primed"] = both.result() - alone.result()
    return {name: 8 * size / len(content) for name, size in found.items()}
