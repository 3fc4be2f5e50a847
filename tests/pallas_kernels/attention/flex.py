"""PyTorch's FlexAttention on the masks of test_flex.py, as a program for .venv-peers: `python flex.py CASES OUT`.

CASES: JSON, a list of {spec, offset, slopes, q, k, v}, operands being shapes drawn with the seed of their place in the list.
OUT: an npz of out0, lse0, out1, … It runs alone, on torch and NumPy, and reads specifications by itself.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


def mask_mod(spec):
    kind, *of = spec
    if kind in ("and", "or"):
        left, right = map(mask_mod, of)
        if kind == "and":
            return lambda b, h, q, kv: left(b, h, q, kv) & right(b, h, q, kv)
        return lambda b, h, q, kv: left(b, h, q, kv) | right(b, h, q, kv)
    if kind == "not":
        inner = mask_mod(of[0])
        return lambda b, h, q, kv: ~inner(b, h, q, kv)
    if kind == "causal":
        return lambda b, h, q, kv: q >= kv
    if kind == "window":
        return lambda b, h, q, kv: (q - kv <= of[0]) & (kv - q <= of[1])
    if kind == "prefix":
        return lambda b, h, q, kv: kv < of[0]
    if kind == "strided":
        return lambda b, h, q, kv: torch.remainder(q - kv, of[0]) == 0
    if kind == "document":
        ids = torch.tensor(of[0])
        return lambda b, h, q, kv: ids[b, q] == ids[b, kv]
    if kind == "function":
        return lambda b, h, q, kv: torch.remainder(q * of[0] + kv * 3 + h + 5 * b, 7) < of[1]
    if kind == "table":
        table = torch.tensor(of[0])
        return lambda b, h, q, kv: table[h, q // of[1], kv // of[1]]
    raise ValueError(kind)


def run(number, case):
    generator = np.random.default_rng(number)
    q, k, v = (torch.tensor(generator.standard_normal(case[name]).astype(np.float32)).transpose(1, 2) for name in "qkv")
    inner, offset = mask_mod(case["spec"]), case["offset"]
    blocks = create_block_mask(
        lambda b, h, q, kv: inner(b, h, q + offset, kv), q.shape[0], q.shape[1], q.shape[2], k.shape[2], device="cpu"
    )
    score_mod = None
    if case["slopes"] is not None:
        slopes = torch.tensor(case["slopes"])
        score_mod = lambda score, b, h, q, kv: score + slopes[h] * (q + offset - kv)  # noqa: E731
    out, lse = flex_attention(q, k, v, score_mod=score_mod, block_mask=blocks, enable_gqa=True, return_lse=True)
    return out.transpose(1, 2).numpy(), lse.transpose(1, 2).numpy()


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        cases = json.load(file)
    found = {}
    for number, case in enumerate(cases):
        found[f"out{number}"], found[f"lse{number}"] = run(number, case)
    np.savez(sys.argv[2], **found)
