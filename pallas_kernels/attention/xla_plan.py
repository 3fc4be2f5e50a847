"""In which order the blocks of a shared, known list are gone through: rows of blocks that go alike are one loop."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from pallas_kernels.attention.block_mask import BlockMask
from pallas_kernels.attention.lists import EMPTY, FULL, transposed

MOST_GROUPS = 16  # programs of their own; more take long to compile


class Group(NamedTuple):
    """Rows that go through equally many blocks: first chunks that are full, then chunks for which the mask is asked.

    rows: [R]. full: [R, chunks, columns a chunk], columns. rest: the same. valid: bool, of rest's shape, or None where all are.
    masked: whether the mask has to be asked about `rest`.
    """

    rows: np.ndarray
    full: np.ndarray
    rest: np.ndarray
    valid: np.ndarray | None
    masked: bool
    together: int  # rows at once; several only where each row's columns are those of the row before moved by one


@functools.lru_cache(maxsize=256)
def plan(blocks: BlockMask, by_key: bool, at_once: int, band: int) -> tuple[Group, ...]:
    """Groups in the order of their first rows. blocks: of one list; by_key: by columns. at_once: the most blocks of a row that
    are computed together; band: of several."""
    lists = transposed(blocks.lists, blocks.sizes.columns) if by_key else blocks.lists
    row, column, kind = (x[0, 0] for x in lists)
    ends = np.searchsorted(row, np.arange(1, int(row[-1]) + 1))
    full, rest = [], []
    for columns, kinds in zip(np.split(column, ends), np.split(kind, ends)):
        columns, kinds = columns[kinds != EMPTY], kinds[kinds != EMPTY]
        sure = columns[kinds == FULL] if len(columns) > at_once else columns[:0]
        sure = sure[: len(sure) // at_once * at_once]  # the full ones first, as many as fill chunks
        full.append(sure)
        rest.append((columns[~np.isin(columns, sure)], bool((kinds != FULL).any())))
    widths = np.array([len(columns) for columns, _ in rest])
    keys = np.stack([[len(x) // at_once for x in full], widths, [asked for _, asked in rest]], axis=-1)
    step = 1
    while len(np.unique(keys, axis=0)) > MOST_GROUPS and step < widths.max():
        step *= 2
        keys[:, 1] = -(-widths // step) * step
        keys[:, 2] |= keys[:, 1] > widths
    groups = []
    for chunks, width, asked in dict.fromkeys(map(tuple, keys)):
        rows = np.nonzero((keys == (chunks, width, asked)).all(-1))[0]
        pieces = max(1, -(-width // at_once))
        wide = -(-width // pieces)  # chunks of one size
        padded = np.zeros((len(rows), pieces * wide), np.int32)
        valid = np.arange(pieces * wide) < widths[rows][:, None]
        for i, r in enumerate(rows):
            mine = rest[r][0]
            padded[i, : len(mine)] = mine
            padded[i, len(mine) :] = mine[-1] if len(mine) else 0
        shape = (len(rows), pieces, wide)
        whole = Group(
            rows,
            np.array([full[r] for r in rows], np.int32).reshape(len(rows), int(chunks), at_once),
            padded.reshape(shape),
            None if valid.all() else valid.reshape(shape),
            bool(asked) or not valid.all(),
            1,
        )
        groups.extend(_cut(whole, band))
    return tuple(groups)


def _cut(group: Group, blocks: int) -> list[Group]:
    """The group in parts that do not wait for each other, the rows of each several at once where they are a band."""
    r, pieces, wide = group.rest.shape
    band = pieces == 1 and not group.full.size and group.valid is None
    band = band and bool((np.diff(group.rows) == 1).all() and (np.diff(group.rest[:, 0], axis=0) == 1).all())
    together = min(r, max(1, blocks // max(1, wide))) if band and wide else 1
    ends = {r // together * together, r}
    if r // together >= 4:
        ends.add(r // together // 2 * together)
    parts, start = [], 0
    for end in sorted(ends - {0}):
        arrays = (None if x is None else x[start:end] for x in group[:4])
        parts.append(Group(*arrays, group.masked, min(together, end - start)))
        start = end
    return parts
