"""Random masks for FlexAttention and ours, as specifications; and our side of reading them. flex.py has torch's."""

from __future__ import annotations

import random

import jax.numpy as jnp
import numpy as np

LEAVES = ("causal", "window", "prefix", "strided", "document", "function", "table")
LENGTH = 40


def drawn(chance: random.Random, depth: int) -> list:
    """Up to `depth` operations deep."""
    kind = chance.choice(["and", "or", "not", "leaf"] if depth else ["leaf"])
    if kind in ("and", "or"):
        return [kind, drawn(chance, depth - 1), drawn(chance, depth - 1)]
    if kind == "not":
        return [kind, drawn(chance, 0 if depth == 1 else depth - 1)]
    kind = chance.choice(LEAVES)
    return [kind, *{
        "causal": list,
        "window": lambda: [chance.randint(0, 20), chance.randint(0, 20)],
        "prefix": lambda: [chance.randint(1, LENGTH)],
        "strided": lambda: [chance.randint(2, 6)],
        "document": lambda: [[sorted(chance.randint(0, 4) for _ in range(LENGTH)) for _ in range(2)]],
        "function": lambda: [chance.randint(0, 5), chance.randint(2, 5)],
        "table": lambda: [[[[chance.random() < 0.6 for _ in range(5)] for _ in range(5)] for _ in range(4)], 8],
    }[kind]()]  # fmt: skip


def kinds(spec: list) -> set[str]:
    parts = spec[1:] if spec[0] in ("and", "or", "not") else []
    return {spec[0]}.union(*map(kinds, parts))


def mask_mod(spec: list):
    kind, *of = spec
    if kind in ("and", "or"):
        left, right = map(mask_mod, of)
        return (lambda *at: left(*at) & right(*at)) if kind == "and" else (lambda *at: left(*at) | right(*at))
    if kind == "not":
        inner = mask_mod(of[0])
        return lambda *at: ~inner(*at)
    if kind in ("document", "table"):
        values = np.array(of[0])
        if kind == "document":
            return lambda b, h, q, kv: jnp.asarray(values)[b, q] == jnp.asarray(values)[b, kv]
        return lambda b, h, q, kv: jnp.asarray(values)[h, q // of[1], kv // of[1]]
    return {
        "causal": lambda b, h, q, kv: kv <= q,
        "window": lambda b, h, q, kv: (kv >= q - of[0]) & (kv <= q + of[1]),
        "prefix": lambda b, h, q, kv: kv < of[0],
        "strided": lambda b, h, q, kv: (q - kv) % of[0] == 0,
        "function": lambda b, h, q, kv: (q * of[0] + kv * 3 + h + 5 * b) % 7 < of[1],
    }[kind]
