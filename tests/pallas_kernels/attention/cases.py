"""The calls that every implementation of attention is checked on, by name, and how they join `kernel_base`.

Most masks are given as block masks of small blocks, so that short sequences have many blocks. For an implementation that wants
other blocks there is `Case.blocks`: `case._replace(blocks=(128, 128))`, or None for those that it chooses itself.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import SelectedBlocks, block_mask, masks, sparse_attention
from tests.pallas_kernels.attention import oracle
from tests.pallas_kernels.attention.oracle import Spec
from tests.pallas_kernels.kernel_base import Kernel

HEADS = 4
GENERATOR = np.random.default_rng(5)
IDS = np.sort(GENERATOR.integers(0, 5, (2, 67)), axis=-1).tolist()
MIXED = GENERATOR.integers(0, 3, 67).tolist()
TABLES = (GENERATOR.random((HEADS, 9, 9)) < 0.3).tolist()


class Case(NamedTuple):
    """mask: a specification, see `oracle.SEES`. offset: q_offset by sequence, or one for all; traced: as data of the step.
    segments: ids of queries and of keys. mod: of `oracle.MODS`."""

    mask: Spec
    q_len: int = 67
    kv_len: int = 67
    q_heads: int = HEADS
    kv_heads: int = 2
    d_qk: int = 8
    d_v: int = 8
    batch: int = 2
    offset: tuple[int, ...] = (0,)
    traced: bool = False
    segments: tuple[Any, Any] | None = None
    sinks: bool = False
    softcap: float | None = None
    scale: float | None = None
    mod: str | None = None
    lse: bool = True
    blocks: tuple[int, int] | None = (16, 32)


def runs(*lengths: int) -> list[list[int]]:
    """Segment ids of packed sequences of these lengths, and for the second row of the batch in reverse."""
    ids = np.repeat(np.arange(len(lengths)), lengths)
    return [ids.tolist(), ids[::-1].tolist()]


SEGMENTS = runs(20, 1, 40, 6)
AND, OR, NOT, CAUSAL = "and", "or", "not", ["causal"]
PICKED = np.array([[0, 0, 2], [1, -1, -1], [-1, -1, -1], [2, 0, 1], [1, 1, 7]])  # twice, none, all, none that exists
PICKS = np.stack([PICKED, PICKED[::-1], (PICKED + 1) % 3, PICKED]).reshape(2, 2, 5, 3)  # [batch, kv_heads, rows, count]


def selected(index: np.ndarray, inside: Spec, offset: int = 0) -> Spec:
    return ["selected", index.tolist(), HEADS, [16, 32], offset, inside]


CASES: dict[str, Case] = {
    "causal": Case(CAUSAL),
    "full": Case(["full"], lse=False),
    "window": Case(["window", 9, 0], kv_heads=1),
    "window to both sides": Case(["window", 5, 20], kv_heads=4, lse=False),
    "window without end": Case(["window", None, 3], scale=0.7),
    "a band of square blocks": Case(["window", 20, 0], kv_heads=1, blocks=(8, 8)),
    "a band to both sides": Case(["window", 9, 12], kv_len=75, sinks=True, mod="learned", blocks=(8, 8)),
    "prefix": Case([OR, CAUSAL, ["prefix", 13]]),
    "block window": Case(["block_window", 6, 2, 1]),
    "documents": Case([AND, CAUSAL, ["document", IDS]]),
    "documents of one list, mixed": Case([AND, ["window", 30, 30], ["document", MIXED]]),
    "dilated": Case(["dilated", 4, 3, 5]),
    "strided": Case([AND, CAUSAL, [OR, ["window", 7, 0], ["strided", 7]]]),
    "global tokens": Case([OR, ["window", 6, 6], ["global", [3, 40]]]),
    "many global tokens": Case([OR, ["window", 2, 2], ["global", list(range(0, 60, 3))]]),
    "first tokens global": Case([AND, CAUSAL, [OR, ["window", 6, 6], ["global", 5]]]),
    "random blocks by head": Case(["random", 3, 8, 2, 67, HEADS]),
    "bigbird": Case(["bigbird", 4, 8, 67]),
    "by head": Case(["heads", CAUSAL, ["window", 4, 4], [NOT, CAUSAL], ["prefix", 3]]),
    "by head and document": Case([AND, ["heads", CAUSAL, ["full"], ["full"], CAUSAL], ["document", IDS]]),
    "function of all": Case(["function", 2, 3], lse=False),
    "complement": Case([NOT, ["window", 8, 8]]),
    "blocks": Case(["blocks", TABLES, 8]),
    "one pair": Case(CAUSAL, q_len=1, kv_len=1, sinks=True),
    "127 and 129": Case(["window", 40, 0], q_len=127, kv_len=129, blocks=None, lse=False),
    "129 and 127": Case(CAUSAL, q_len=129, kv_len=127, blocks=None, lse=False),
    "fewer queries": Case(["window", 19, 0], q_len=31, offset=(36,)),
    "fewer keys": Case(["window", 9, 3], kv_len=31, sinks=True),
    "fewer keys, nothing seen": Case(["window", 9, 3], kv_len=31),
    "nothing seen at all": Case([AND, CAUSAL, [NOT, CAUSAL]]),
    "other values": Case(CAUSAL, d_v=24),
    "segments": Case(CAUSAL, segments=(SEGMENTS, SEGMENTS)),
    "segments mixed": Case(["full"], segments=([MIXED, MIXED[::-1]], [MIXED[::-1], MIXED])),
    "segments of other keys": Case(["full"], q_len=31, segments=(runs(10, 21), runs(0, 5, 62))),
    "sinks": Case(CAUSAL, sinks=True),
    "softcap": Case(["window", 15, 0], softcap=1.5),
    "alibi": Case(CAUSAL, mod="alibi"),
    "learned score": Case(["window", 20, 20], mod="learned"),
    "everything": Case(
        [AND, ["window", 30, 0], [NOT, ["strided", 3]]], d_v=16, offset=(3,), segments=(SEGMENTS, SEGMENTS), sinks=True,
        softcap=2.0, mod="learned",
    ),
    "traced offset": Case(["window", 19, 0], q_len=31, offset=(36,), traced=True, sinks=True),
    "traced offsets": Case([OR, CAUSAL, ["prefix", 4]], q_len=31, offset=(36, 5), traced=True, segments=(
        [[1] * 31, [0] * 31], [[1] * 40 + [0] * 27] * 2), mod="alibi"),
    "traced offset, by head and document": Case(
        [AND, ["heads", CAUSAL, ["window", 4, 4], [NOT, CAUSAL], ["prefix", 3]], ["document", IDS]], q_len=31, offset=(36,),
        traced=True, blocks=None,
    ),
    "a step of decoding": Case(["window", 19, 0], q_len=1, offset=(66, 11), traced=True, blocks=None),
    "selected": Case(selected(PICKS[:1, :1], ["full"])),
    "selected by key head": Case(selected(PICKS, CAUSAL)),
    "selected by query head": Case(selected(PICKS.reshape(1, 4, 5, 3), ["window", 30, 10]), mod="learned", softcap=2.0),
    "selected, segments and sinks": Case(selected(PICKS, CAUSAL), segments=(SEGMENTS, SEGMENTS), sinks=True),
    "selected at an offset": Case(selected(PICKS[:, :, :2], CAUSAL, 36), q_len=31, offset=(36,), traced=True),
}  # fmt: skip


def function(a: int, c: int) -> masks.Mask:
    return masks.from_function(lambda b, h, q, kv: (q * a + kv * 3 + h + 5 * b) % 7 < c)


MADE = {
    "full": masks.full, "causal": masks.causal, "window": masks.window, "block_window": masks.block_window,
    "prefix": masks.prefix, "document": masks.document, "strided": masks.strided, "dilated": masks.dilated,
    "global": masks.global_tokens, "random": masks.random_blocks, "bigbird": masks.bigbird, "function": function,
    "blocks": lambda tables, size: masks.Blocks(masks.Data(tables[0] if len(tables) == 1 else tables), size),
    "and": lambda *parts: functools.reduce(lambda x, y: x & y, map(made, parts)),
    "or": lambda *parts: functools.reduce(lambda x, y: x | y, map(made, parts)),
    "not": lambda part: ~made(part),
    "heads": lambda *parts: masks.per_head(*map(made, parts)),
}  # fmt: skip


def made(spec: Spec) -> masks.Mask:
    """The mask of `pallas_kernels` that the specification means."""
    kind, *of = spec
    return MADE[kind](*of)


def plain(spec: Spec) -> Spec:
    """Without what is drawn at random: the blocks that were drawn, read from the mask, stand there instead."""
    kind, *of = spec
    if kind == "random":
        blocks = made(spec)
        return ["blocks", np.atleast_3d(blocks.table.values.T).T.tolist(), blocks.size]
    if kind == "bigbird":
        key, size, length = of
        return [OR, ["block_window", size, 1, 1], ["global", 2 * size], plain(["random", key, size, 3, length, 0])]
    return [kind, *(plain(part) if isinstance(part, list) and part and isinstance(part[0], str) else part for part in of)]


def mask_of(case: Case) -> Any:
    if case.mask[0] == "selected":
        _, index, _, (q_block, kv_block), _, inside = case.mask
        return SelectedBlocks(np.array(index, np.int32), q_block, kv_block, made(inside))
    mask = made(case.mask)
    if case.blocks is None:
        return mask
    offset = case.offset[0] if not case.traced else 0
    heads, batch = (case.q_heads if mask.heads else 0), (case.batch if mask.batch else 0)
    return block_mask(mask, case.q_len, case.kv_len, *case.blocks, q_offset=offset, heads=heads, batch=batch)


def arrays(case: Case) -> dict[str, np.ndarray]:
    shapes = {
        "q": (case.batch, case.q_len, case.q_heads, case.d_qk),
        "k": (case.batch, case.kv_len, case.kv_heads, case.d_qk),
        "v": (case.batch, case.kv_len, case.kv_heads, case.d_v),
    }
    if case.sinks:
        shapes["sinks"] = (case.q_heads,)
    if case.mod == "learned":
        shapes |= {"bias": (case.q_heads, 41), "gain": (case.q_heads,)}
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def score_mod(case: Case, of: dict[str, Any]) -> Any:
    if case.mod == "alibi":
        return lambda score, b, h, q, kv: score - jnp.exp2(-(h + 1.0)) * jnp.abs(q - kv)
    if case.mod == "learned":
        bias, gain = of["bias"], of["gain"]
        return lambda score, b, h, q, kv: score * gain[h] + bias[h, jnp.clip(q - kv + 20, 0, 40)]
    return None


def offset_of(case: Case) -> Any:
    if not case.traced:
        return case.offset[0]
    return jnp.asarray(case.offset[0] if len(case.offset) == 1 else case.offset, jnp.int32)


def attend(case: Case, of: dict[str, Any], implementation: str | None, mask: Any = None, offset: Any = None) -> Any:
    segments = None if case.segments is None else tuple(jnp.asarray(ids, jnp.int32) for ids in case.segments)
    return sparse_attention(
        of["q"], of["k"], of["v"], mask_of(case) if mask is None else mask,
        q_offset=offset_of(case) if offset is None else offset,
        score_mod=score_mod(case, of), segment_ids=segments, sinks=of.get("sinks"), softcap=case.softcap, scale=case.scale,
        return_lse=case.lse, implementation=implementation,
    )  # fmt: skip


def call(case: Case, implementation: str | None) -> Any:
    """The function of a case's arrays. A traced offset is data of the step also where the function is compiled."""
    if not case.traced:
        return lambda of: attend(case, of, implementation)
    jitted = jax.jit(lambda of, offset: attend(case, of, implementation, offset=offset))
    return lambda of: jitted(of, offset_of(case))


def seen(case: Case) -> np.ndarray:
    """bool [batch, heads, q_len, kv_len], by the oracle."""
    table = oracle.table(plain(case.mask), case.batch, case.q_heads, case.q_len, case.kv_len, case.offset)
    if case.segments is not None:
        q_ids, kv_ids = map(np.array, case.segments)
        table &= (q_ids[:, :, None] == kv_ids[:, None, :])[:, None]
    return table


def exact(case: Case, of: dict[str, np.ndarray], cotangents: Any) -> Any:
    mod = oracle.MODS[case.mod] if case.mod else None
    return oracle.attention(seen(case), of, cotangents, offset=case.offset, softcap=case.softcap, scale=case.scale, mod=mod)


KERNEL = Kernel(cases=CASES, arrays=arrays, call=call, oracle=exact)
