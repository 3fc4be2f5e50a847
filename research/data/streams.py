"""Streams of batches through grain, whose position is one number.

A `Source` gives records by row, many at once; `train_batches` and `ordered_batches` make `research.core.types.Batches` of it.
What the i-th batch holds is a function of i alone, so a position is `{"next_index": i}`, it can be computed for any step, and
every process of a run has the same one, however many there are.

Grain does the iterating, the position and the threads. The order is made here, an epoch's permutation at a time, for three
reasons: grain's shuffle costs about 10 us a record, which is more than a whole step of a small task; its shuffle of seed s in
epoch e is that of seed s + 1 in epoch e - 1, so runs that differ in their seed would see one order; and an order that a
position counts in must not change with grain's version. Grain's state names nothing but a number, so `Batches.fingerprint` says
what the number counts: content, order, batch size and epoch rule.
"""

from __future__ import annotations

import copy
import functools
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from research.core.types import Batches, BatchIterator
from research.data.determinism import digest, generator, permutation

ORDER_VERSION = 1  # raised when the same arguments begin to give other batches
REMAINDERS = ("drop", "pad")
BAD_RECORDS = ("raise", "skip")
logger = logging.getLogger(__name__)

Record = dict[str, np.ndarray]
Transform = Callable[[Record, np.random.Generator], Record]


@runtime_checkable
class Source(Protocol):
    """Records by row.

    fingerprint: names the content; equal only for equal content.
    gather: (rows int64 [n], epoch) -> {name: array [n, ...]}, the same for the same arguments, from any thread. "mask"
        (float32, [n] or [n, ...], 1 where it counts) may be among them. Only sources that are cut anew every epoch look at
        `epoch`.
    """

    fingerprint: str

    def __len__(self) -> int: ...
    def gather(self, rows: np.ndarray, epoch: int) -> Record: ...


class _Records:
    """A Source of any random-access sequence of dict records; read through once for its fingerprint if it has none."""

    def __init__(self, records: Any):
        self._records = records
        self.fingerprint = getattr(records, "fingerprint", None) or self._read_through()

    def _read_through(self) -> str:
        hashes = []
        for i in range(len(self._records)):
            record = self._records[i]
            if not isinstance(record, Mapping):
                raise ValueError(f"record {i} is a {type(record).__name__}, a dict of arrays is wanted")
            hashes.append(digest(*(part for name in sorted(record) for part in (name, np.asarray(record[name])))))
        return f"records {len(hashes)} {digest(*hashes)}"

    def __len__(self) -> int:
        return len(self._records)

    def gather(self, rows: np.ndarray, epoch: int) -> Record:
        return _stacked([self._records[int(row)] for row in rows], rows)


class _Subset:
    def __init__(self, source: Source, rows: np.ndarray):
        self._source, self._rows = source, rows
        self.fingerprint = f"subset {digest(rows)} of {source.fingerprint}"

    def __len__(self) -> int:
        return len(self._rows)

    def gather(self, rows: np.ndarray, epoch: int) -> Record:
        return self._source.gather(self._rows[rows], epoch)


def as_source(records: Any) -> Source:
    """A Source as it is; a sequence of dict records (a list, a grain data source, a finite grain MapDataset) as a Source.

    Raises ValueError where there are no records, where they have no end, or where they are not dicts.
    """
    if isinstance(records, Mapping):
        raise ValueError(
            f"records are wanted, given a dict of {', '.join(map(repr, records))}; array_source makes records of arrays"
        )
    if not len(records):
        raise ValueError(f"the source {type(records).__name__} holds no records")
    if len(records) == sys.maxsize:
        raise ValueError(f"the source {type(records).__name__} repeats without end; give one epoch of it, streams repeat it")
    return records if isinstance(records, Source) else _Records(records)


def subset(records: Any, rows: Sequence[int] | np.ndarray) -> Source:
    """The Source of the given rows (int [n]), in that order. Raises ValueError for a row that is not there, or none."""
    source, chosen = as_source(records), np.asarray(rows, np.int64)
    if not chosen.size or chosen.min() < 0 or chosen.max() >= len(source):
        given = f"{chosen.min()} to {chosen.max()}" if chosen.size else "none"
        raise ValueError(f"rows: given {given}, allowed 0 to {len(source) - 1}")
    return _Subset(source, chosen)


def _stacked(records: Sequence[Mapping[str, Any]], rows: np.ndarray) -> Record:
    first = records[0]
    for row, record in zip(rows, records, strict=True):
        for name in sorted(set(first) ^ set(record)):
            raise ValueError(f"record {row} and record {rows[0]} do not both hold {name!r}")
        for name in first:
            if np.shape(record[name]) != np.shape(first[name]):
                shapes = f"{np.shape(record[name])}, that of record {rows[0]} {np.shape(first[name])}"
                raise ValueError(f"record {row}: {name!r} has shape {shapes}; they must be equal to make a batch")
    return {name: np.stack([np.asarray(record[name]) for record in records]) for name in first}


class _BatchList:
    """The i-th batch by number: what grain iterates over."""

    def __init__(
        self,
        source: Source,
        batch_size: int,
        order: Callable[[int], np.ndarray],
        per_epoch: int,
        length: int,
        bad_records: str,
        transform: Callable[[Record, int, int], Record] | None = None,
    ):
        if bad_records not in BAD_RECORDS:
            raise ValueError(f"bad_records: given {bad_records!r}, allowed {' or '.join(map(repr, BAD_RECORDS))}")
        self._source, self._batch_size, self._order = source, batch_size, order
        self._per_epoch, self._length, self._transform = per_epoch, length, transform
        self._skipped: set[int] | None = set() if bad_records == "skip" else None
        self._share = slice(0, batch_size)

    def rows(self, start: int, stop: int) -> _BatchList:
        """The same, of which each batch holds these rows only."""
        if not 0 <= start < stop <= self._batch_size:
            raise ValueError(f"rows: given {start} to {stop}, allowed: some of 0 to {self._batch_size}")
        part = copy.copy(self)
        part._share = slice(start, stop)
        return part

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        epoch, number = divmod(index, self._per_epoch)
        rows = self._order(epoch)[number * self._batch_size : (number + 1) * self._batch_size]
        held = len(rows)
        # Padding repeats a real record: zeros could give a NaN (log 0, 0 / 0) that a mask of 0 does not undo.
        rows = np.concatenate([rows, np.full(self._batch_size - held, rows[0])])[self._share]
        batch, good = self._gathered(rows, epoch)
        batch = self._transformed(batch, rows, epoch)
        mask = np.asarray(batch["mask"], np.float32) if "mask" in batch else np.ones(len(rows), np.float32)
        real = ((np.arange(self._batch_size) < held)[self._share] & good).reshape(-1, *[1] * (mask.ndim - 1))
        return {**batch, "mask": mask * real}

    def _gathered(self, rows: np.ndarray, epoch: int) -> tuple[Record, np.ndarray]:
        """(the records, which of them are good); in place of a bad one, the first good one of the epoch's order.

        Raises ValueError naming the source and the record, where bad records are not skipped or all are bad.
        """
        good = np.ones(len(rows), bool)
        batch, why = _read(self._source, rows, epoch)
        if why is None:
            return batch, good
        instead = rows.copy()
        for i, row in enumerate(rows):
            _, why = _read(self._source, rows[i : i + 1], epoch)
            if why is not None:
                self._tell(int(row), why)
                good[i], instead[i] = False, self._good_one(epoch)
        return self._source.gather(instead, epoch), good

    def _tell(self, row: int, why: str) -> None:
        said = f"record {row} of {self._source.fingerprint} {why}"
        if self._skipped is None:
            raise ValueError(f"{said}; allowed: records that are whole and finite, or bad_records='skip'")
        if row not in self._skipped:
            self._skipped.add(row)
            logger.warning("%s: skipped; %d so far", said, len(self._skipped))

    def _good_one(self, epoch: int) -> int:
        found = (row for row in self._order(epoch) if _read(self._source, np.asarray([row]), epoch)[1] is None)
        row = next(found, None)
        if row is None:
            raise ValueError(f"{self._source.fingerprint} holds no record that can be read and is finite")
        return int(row)

    def _transformed(self, batch: Record, rows: np.ndarray, epoch: int) -> Record:
        if self._transform is None:
            return batch
        records = [{name: x[i] for name, x in batch.items()} for i in range(len(rows))]
        return _stacked([self._transform(r, epoch, int(row)) for r, row in zip(records, rows, strict=True)], rows)


def _read(source: Source, rows: np.ndarray, epoch: int) -> tuple[Record, str | None]:
    """The records of these rows, and what is wrong with any: they cannot be read, or NaN or infinity is where they count."""
    try:
        batch = source.gather(rows, epoch)
    except (ValueError, OSError, KeyError) as error:
        return {}, f"cannot be read ({error})"
    counts = np.asarray(batch["mask"]).reshape(len(rows), -1).any(1) if "mask" in batch else np.ones(len(rows), bool)
    for name, x in batch.items():
        if np.issubdtype(x.dtype, np.inexact) and not np.isfinite(x[counts]).all():
            return batch, f"is not finite: {name!r} holds NaN or infinity"
    return batch, None


def batches_per_epoch(records: Any, batch_size: int, *, remainder: str) -> int:
    """How many batches `train_batches` gives before it shuffles again."""
    if remainder not in REMAINDERS:
        raise ValueError(f"remainder: given {remainder!r}, allowed {' or '.join(map(repr, REMAINDERS))}")
    return len(records) // batch_size if remainder == "drop" else -(-len(records) // batch_size)


def train_batches(
    records: Any,
    batch_size: int,
    *,
    seed: int,
    remainder: str,
    transform: Transform | None = None,
    bad_records: str = "raise",
    threads: int = 0,
) -> Batches:
    """Batches without end, every record once an epoch, in another order every epoch.

    Args:
      records: a Source, or a sequence of dict records of NumPy arrays (see `as_source`).
      batch_size: of the whole run; no batch holds records of two epochs.
      seed: any int; orders of different seeds have nothing in common.
      remainder: "drop" leaves out the last len(records) % batch_size records of every epoch's order (others each time);
        "pad" gives them in a batch filled up with mask 0.
      transform: (record, generator) -> record, on the host. Its generator depends on seed, epoch and row, not on the batch. The
        fingerprint knows it by its `fingerprint` attribute, or by module and name.
      bad_records: what becomes of a record that cannot be read, or holds NaN or infinity: "raise" names it and its source,
        "skip" does so in a warning, which counts them, and gives another in its place with mask 0.
      threads: grain's reading threads; 0 for what is in memory. The position counts batches handed out, not read ahead.

    Returns:
      Batches of {name: array [batch_size, ...]} with "mask" float32 always among them. A position is
      {"next_index": batches so far}.

    Raises:
      ValueError: no records, batch_size not in 1..len(records), an unknown remainder.
    """
    source = as_source(records)
    _check(batch_size)
    if batch_size > len(source):
        raise ValueError(f"batch_size: given {batch_size}, allowed at most {len(source)}, the size of the data set")
    per_epoch = batches_per_epoch(source, batch_size, remainder=remainder)

    @functools.lru_cache(maxsize=2)  # reading threads may be on both sides of an epoch's end
    def order(epoch: int) -> np.ndarray:
        return permutation(len(source), seed, epoch)

    applied = None if transform is None else lambda record, epoch, row: transform(record, generator(seed, epoch, row))
    items = _BatchList(source, batch_size, order, per_epoch, sys.maxsize, bad_records, applied)
    name = f"train v{ORDER_VERSION} batch_size={batch_size} seed={seed} remainder={remainder} transform={_name(transform)}"
    return _batches(items, f"{name} source=({source.fingerprint})", _position(None), threads)


def ordered_batches(records: Any, batch_size: int, *, bad_records: str = "raise", threads: int = 0) -> Batches:
    """Every record once, in order; the last batch is filled up with mask 0, so that all have one shape.

    Arguments, batches, positions and errors as in `train_batches`, but batch_size may exceed the number of records.
    """
    source = as_source(records)
    _check(batch_size)
    count = -(-len(source) // batch_size)
    rows = np.arange(len(source))
    items = _BatchList(source, batch_size, lambda epoch: rows, count, count, bad_records)
    name = f"ordered v{ORDER_VERSION} batch_size={batch_size} source=({source.fingerprint})"
    return _batches(items, name, _position(count), threads)


def _check(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size: given {batch_size}, allowed 1 and more")


def _name(transform: Transform | None) -> str:
    if transform is None:
        return "none"
    given = getattr(transform, "fingerprint", None)
    if given is not None:
        return str(given)
    if isinstance(transform, functools.partial):
        return f"{_name(transform.func)}(*{transform.args!r}, **{transform.keywords!r})"
    named = transform if hasattr(transform, "__qualname__") else type(transform)
    return f"{named.__module__}.{named.__qualname__}"


def _batches(items: _BatchList, name: str, position: Callable[[int], dict[str, int]], threads: int) -> Batches:
    def rows(start: int, stop: int) -> Batches:
        return _batches(items.rows(start, stop), name, position, threads)

    return Batches(_opener(items, threads), name, position, rows)


def _opener(items: _BatchList, threads: int) -> Callable[[], BatchIterator]:
    def open_() -> BatchIterator:
        import grain  # a second to import, which `--help` and error messages should not wait for

        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        return iter(grain.MapDataset.source(items).to_iter_dataset(options))

    return open_


def _position(count: int | None) -> Callable[[int], dict[str, int]]:
    def position(step: int) -> dict[str, int]:
        if step < 0 or (count is not None and step > count):
            raise ValueError(f"position: given step {step}, allowed 0 to {'any' if count is None else count}")
        return {"next_index": int(step)}

    return position
