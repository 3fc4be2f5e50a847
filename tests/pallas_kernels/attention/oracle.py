"""Attention in NumPy and float64, query by query as its definition says it, with derivatives written by hand.

It shares nothing with `pallas_kernels`: masks are specifications (nested lists, as JSON has them), read here pair by pair in
plain Python, and by `cases.made` into the masks that are tested.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tests.pallas_kernels.kernel_base import Results

Spec = list  # ["and", ["causal"], ["not", ["window", 3, 0]]]


def sees(spec: Spec, b: int, h: int, q: int, kv: int) -> bool:
    """Whether query q sees key kv."""
    kind, *of = spec
    return bool(SEES[kind](b, h, q, kv, *of))


SEES: dict[str, Callable[..., Any]] = {
    "full": lambda b, h, q, kv: True,
    "causal": lambda b, h, q, kv: kv <= q,
    "window": lambda b, h, q, kv, left, right: (
        (left is None or kv >= q - left) and (right is None or kv <= q + right)
    ),
    "block_window": lambda b, h, q, kv, size, left, right: q // size - left <= kv // size <= q // size + right,
    "prefix": lambda b, h, q, kv, n: kv < n,
    "document": lambda b, h, q, kv, ids: _id(ids, b, q) == _id(ids, b, kv),
    "strided": lambda b, h, q, kv, stride: (q - kv) % stride == 0,
    "dilated": lambda b, h, q, kv, left, right, step: any(kv == q + i * step for i in range(-left, right + 1)),
    "global": lambda b, h, q, kv, which: (q < which or kv < which) if isinstance(which, int) else (q in which or kv in which),
    "blocks": lambda b, h, q, kv, tables, size: tables[h % len(tables)][q // size][kv // size],
    "and": lambda b, h, q, kv, *parts: all(sees(part, b, h, q, kv) for part in parts),
    "or": lambda b, h, q, kv, *parts: any(sees(part, b, h, q, kv) for part in parts),
    "not": lambda b, h, q, kv, part: not sees(part, b, h, q, kv),
    "heads": lambda b, h, q, kv, *parts: sees(parts[h], b, h, q, kv),
    "function": lambda b, h, q, kv, a, c: (q * a + kv * 3 + h + 5 * b) % 7 < c,
    "selected": lambda b, h, q, kv, index, heads, size, offset, inside: (
        kv // size[1] in index[b % len(index)][h // (heads // len(index[0]))][(q - offset) // size[0]]
        and sees(inside, b, h, q, kv)
    ),
}  # fmt: skip

TOLD_APART = {"document", "blocks", "heads", "function", "selected"}  # that may differ by sequence or head


def _id(ids: Sequence[Any], b: int, position: int) -> int:
    row = ids[b] if isinstance(ids[0], list) else ids
    return row[min(position, len(row) - 1)]


def table(spec: Spec, batch: int, heads: int, q_len: int, kv_len: int, offset: Sequence[int] = (0,)) -> np.ndarray:
    """bool [batch, heads, q_len, kv_len]. offset: of the queries, by sequence or one for all."""
    alike = len(offset) == 1 and not TOLD_APART & set(kinds(spec))
    seen = np.zeros((1, 1, q_len, kv_len) if alike else (batch, heads, q_len, kv_len), bool)
    for b, h, q, kv in itertools.product(*map(range, seen.shape)):
        seen[b, h, q, kv] = sees(spec, b, h, q + offset[b % len(offset)], kv)
    return np.broadcast_to(seen, (batch, heads, q_len, kv_len)).copy()


def kinds(spec: Any) -> Iterator[str]:
    if isinstance(spec, list) and spec and isinstance(spec[0], str):
        yield spec[0]
        for part in spec[1:]:
            yield from kinds(part)


def attention(
    seen: np.ndarray,
    arrays: dict[str, np.ndarray],
    cotangents: Any,
    *,
    offset: Sequence[int] = (0,),
    softcap: float | None = None,
    scale: float | None = None,
    mod: Callable[..., Any] | None = None,
) -> Results:
    """((out, lse), gradients of all `arrays`): q, k, v, and sinks if there are any, and what `mod` reads.

    mod(score, h, q_index, kv_indices, arrays) -> (score, its derivative by score, {name: (index, derivative by that entry)}).
    cotangents: of (out, lse), or of out alone.
    """
    q, k, v = (arrays[name] for name in "qkv")
    (batch, q_len, heads, d_qk), group = q.shape, q.shape[2] // k.shape[2]
    scale = 1 / np.sqrt(d_qk) if scale is None else scale
    d_out, d_lse = cotangents if isinstance(cotangents, tuple) else (cotangents, np.zeros((batch, q_len, heads)))
    out, lse = np.zeros((batch, q_len, heads, v.shape[3])), np.full((batch, q_len, heads), -np.inf)
    grads = {name: np.zeros(x.shape) for name, x in arrays.items()}
    for b, t, h in itertools.product(range(batch), range(q_len), range(heads)):
        keys, kv_head = np.nonzero(seen[b, h, t])[0], h // group
        raw = scale * (k[b, keys, kv_head] @ q[b, t, h])
        score, slope, by_array = raw, np.ones(len(keys)), {}
        if softcap is not None:
            score, slope = softcap * np.tanh(raw / softcap), 1 - np.tanh(raw / softcap) ** 2
        if mod is not None:
            score, more, by_array = mod(score, h, t + offset[b % len(offset)], keys, arrays)
            slope = slope * more
        everything = np.append(score, arrays["sinks"][h]) if "sinks" in arrays else score
        if not len(everything):
            continue
        weights = np.exp(everything - everything.max())
        lse[b, t, h] = np.log(weights.sum()) + everything.max()
        weights = weights / weights.sum()
        p = weights[: len(keys)]
        out[b, t, h] = p @ v[b, keys, kv_head]

        d_all = np.append(v[b, keys, kv_head] @ d_out[b, t, h], 0)[: len(weights)]  # of the weights; a sink has no value
        d_score = weights * (d_all - weights @ d_all + d_lse[b, t, h])
        if "sinks" in arrays:
            grads["sinks"][h] += d_score[-1]
            d_score = d_score[:-1]
        for name, (index, derivative) in by_array.items():
            np.add.at(grads[name], index, d_score * derivative)
        d_raw = scale * d_score * slope
        grads["v"][b, keys, kv_head] += p[:, None] * d_out[b, t, h]
        grads["k"][b, keys, kv_head] += d_raw[:, None] * q[b, t, h]
        grads["q"][b, t, h] = d_raw @ k[b, keys, kv_head]
    values = (out, lse) if isinstance(cotangents, tuple) else out
    return Results(values, grads)


# score_mods of the tests: (score, h, q_index, kv_indices, arrays) -> see `attention`.


def alibi(score, h, q, kv, arrays):
    return score - 0.5 ** (h + 1) * np.abs(q - kv), np.ones(len(kv)), {}


def learned(score, h, q, kv, arrays):
    """A learned bias by distance, and a learned gain of the head, so that the derivative by the score is not one."""
    bias, gain = arrays["bias"], arrays["gain"]
    at = np.clip(q - kv + bias.shape[1] // 2, 0, bias.shape[1] - 1)
    head = np.full(len(kv), h)
    return score * gain[h] + bias[h, at], gain[head], {"bias": ((head, at), 1.0), "gain": (head, score)}


MODS = {"alibi": alibi, "learned": learned}
