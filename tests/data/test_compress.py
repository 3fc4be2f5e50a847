"""What compressors make of a text: the sizes are those of the standard library's own calls."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib

import numpy as np
import pytest

from research.data.compress import compressed_bits_per_byte

TEXT = "".join(f"line {i * i % 977} of a text that repeats itself\n" for i in range(300)).encode()
NOISE = np.random.RandomState(0).bytes(4000)


def test_every_compressor_is_at_its_strongest_and_every_byte_counts():
    found = compressed_bits_per_byte(TEXT)
    assert list(found) == ["gzip -9", "bz2 -9", "xz -9e"]
    sizes = {name: round(bits * len(TEXT) / 8) for name, bits in found.items()}
    deflated = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    header_and_trailer = 10 + 8
    assert sizes["gzip -9"] == len(deflated.compress(TEXT) + deflated.flush()) + header_and_trailer
    assert sizes["gzip -9"] < len(gzip.compress(TEXT, 1))
    assert sizes["bz2 -9"] == len(bz2.compress(TEXT, 9))
    assert sizes["xz -9e"] == len(lzma.compress(TEXT, check=lzma.CHECK_NONE, preset=9 | lzma.PRESET_EXTREME))


def test_noise_does_not_compress_so_no_byte_of_it_is_left_out():
    found = compressed_bits_per_byte(NOISE, TEXT)
    assert all(8 <= bits < 9.2 for bits in found.values()), found


@pytest.mark.parametrize("others, at_most", [(NOISE, 0.2), (NOISE[:2000] + TEXT, 4.6)], ids=["all of it", "half of it"])
def test_priming_with_the_same_text_leaves_little_to_add(others, at_most):
    found = compressed_bits_per_byte(NOISE, others)
    assert found["xz -9e"] > 8 and 0 < found["xz -9e, primed"] < at_most
    alone = {k: v for k, v in found.items() if k != "xz -9e, primed"}
    assert alone == compressed_bits_per_byte(NOISE)  # the others are not primed


def test_nothing_to_compress_is_refused():
    with pytest.raises(ValueError, match="the content is empty"):
        compressed_bits_per_byte(b"", TEXT)
