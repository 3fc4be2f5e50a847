"""Streams: every record once an epoch, positions that are one number, and grain's traps."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import sys

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.batches import open_at
from research.data.arrays import array_source
from research.data.determinism import permutation
from research.data.streams import as_source, batches_per_epoch, ordered_batches, subset, train_batches

RECORDS = [{"inputs": np.full(3, i, np.float32), "targets": np.int32(i)} for i in range(11)]


PINNED = ([1, 4, 0, 2, 7, 5, 6, 3], [[6, 2, 1, 3], [7, 0, 9, 5], [4, 8]])


def numbers(count: int):
    return array_source({"targets": np.arange(count, dtype=np.int32)})


def drawn(batches, count: int, begin=None):
    iterator = batches.open()
    if begin is not None:
        iterator.set_state(begin)
    return [next(iterator) for _ in range(count)]


def targets(batch) -> list[int]:
    """Those that count."""
    return batch["targets"][batch["mask"] > 0].tolist()


def assert_equal(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert sorted(a) == sorted(b)
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.sampled_from(["drop", "pad"]), st.integers(0, 2**40))
def test_every_record_is_given_once_an_epoch(count, batch_size, remainder, seed):
    batch_size = min(batch_size, count)
    per_epoch = batches_per_epoch(range(count), batch_size, remainder=remainder)
    batches = drawn(train_batches(numbers(count), batch_size, seed=seed, remainder=remainder), 3 * per_epoch)
    for epoch in range(3):
        seen = sorted(t for batch in batches[epoch * per_epoch : (epoch + 1) * per_epoch] for t in targets(batch))
        assert len(set(seen)) == len(seen)
        assert len(seen) == count if remainder == "pad" else len(seen) == count - count % batch_size
        assert all(len(batch["targets"]) == batch_size for batch in batches)


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(seed, epoch):
        batches = drawn(train_batches(numbers(64), 64, seed=seed, remainder="drop"), epoch + 1)
        return tuple(batches[epoch]["targets"])

    orders = [order(seed, epoch) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == len(orders)
    assert order(2, 3) == order(2, 3)


def test_orders_are_pinned_so_that_old_positions_stay_true():
    assert permutation(8, 0, 0).tolist() == PINNED[0]
    batches = drawn(train_batches(numbers(10), 4, seed=3, remainder="pad"), 3)
    assert [targets(batch) for batch in batches] == PINNED[1]


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 2, 3, 4, 5, 8, 9])  # an epoch is 4 batches
def test_a_saved_position_goes_on_bit_for_bit(taken, threads):
    batches = train_batches(RECORDS, 3, seed=5, remainder="pad", threads=threads)
    straight = drawn(batches, taken + 6)
    first = batches.open()
    for _ in range(taken):
        next(first)
    state = json.loads(json.dumps(dict(first.get_state())))
    assert_equal(drawn(batches, 6, state), straight[taken:])
    again = train_batches(RECORDS, 3, seed=5, remainder="pad", threads=2 - threads)  # threads are no part of the position
    assert again.fingerprint == batches.fingerprint
    assert_equal(drawn(again, 6, state), straight[taken:])
    assert batches.position(taken) == state
    assert_equal([next(open_at(batches, taken))], straight[taken : taken + 1])


def test_an_iterator_can_be_set_back_while_it_reads_ahead():
    batches = train_batches(RECORDS, 3, seed=5, remainder="drop", threads=2)
    iterator = batches.open()
    first = [next(iterator) for _ in range(5)]
    iterator.set_state(batches.position(0))
    assert_equal([next(iterator) for _ in range(5)], first)


def test_ordered_batches_give_all_in_order_and_mask_the_padding():
    batches = ordered_batches(RECORDS, 4)
    given_ = list(batches.open())
    assert [targets(batch) for batch in given_] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert given_[-1]["inputs"].shape == (4, 3)
    np.testing.assert_array_equal(given_[-1]["mask"], np.float32([1, 1, 1, 0]))
    for taken in range(4):
        iterator = batches.open()
        iterator.set_state(batches.position(taken))
        assert_equal(list(iterator), given_[taken:])


def test_ordered_batches_may_be_larger_than_the_source():
    (batch,) = ordered_batches(numbers(3), 8).open()
    assert targets(batch) == [0, 1, 2] and batch["mask"].sum() == 3


def test_padding_repeats_a_real_record():
    (batch,) = ordered_batches(array_source({"inputs": np.float32([5, 7])}), 4).open()
    np.testing.assert_array_equal(batch["inputs"], np.float32([5, 7, 5, 5]))


@pytest.mark.parametrize("shape", [(), (2,)])
def test_a_mask_of_the_records_is_kept_and_padding_masked_beside_it(shape):
    mask = np.asarray([np.full(shape, i % 2) for i in range(5)], np.float32)
    batches = list(ordered_batches(array_source({"mask": mask}), 4).open())
    np.testing.assert_array_equal(np.concatenate([b["mask"] for b in batches]), np.concatenate([mask, 0 * mask[:3]]))
    assert batches[0]["mask"].dtype == np.float32


@pytest.mark.parametrize("batches", [train_batches(RECORDS, 6, seed=1, remainder="pad"), ordered_batches(RECORDS, 6)])
def test_parts_of_the_rows_join_to_the_whole_and_share_its_position(batches):
    """Grain has one state a process, which another number of processes cannot take up; ours is the same in all."""
    whole = drawn(batches, 2)
    for cuts in ((0, 3, 6), (0, 2, 4, 6), (0, 1, 6)):
        shards = [batches.rows(start, stop) for start, stop in itertools.pairwise(cuts)]
        assert {shard.fingerprint for shard in shards} == {batches.fingerprint}
        states = []
        for number in range(2):
            parts = [drawn(shard, 1, shard.position(number))[0] for shard in shards]
            assert_equal([{k: np.concatenate([p[k] for p in parts]) for k in parts[0]}], [whole[number]])
            states.append([shard.position(number) for shard in shards])
        assert all(state == states[1][0] for state in states[1])


def noisy(record, rng):
    return {"inputs": record["inputs"] + rng.normal(size=3).astype(np.float32), "targets": record["targets"]}


def test_a_transform_depends_on_seed_epoch_and_record_alone():
    def by_record(batch_size, seed, epochs=1, rows=None):
        batches = train_batches(RECORDS, batch_size, seed=seed, remainder="pad", transform=noisy)
        batches = batches.rows(*rows) if rows else batches
        per_epoch = batches_per_epoch(RECORDS, batch_size, remainder="pad")
        last = drawn(batches, per_epoch, batches.position((epochs - 1) * per_epoch))
        return {int(t): x.tobytes() for b in last for t, x, m in zip(b["targets"], b["inputs"], b["mask"], strict=True) if m}

    assert by_record(3, 1) == by_record(4, 1) == by_record(4, 1, rows=(0, 1)) | by_record(4, 1, rows=(1, 4))
    assert len(set(by_record(3, 1).values()) | set(by_record(3, 2).values()) | set(by_record(3, 1, epochs=2).values())) == 33


def test_the_fingerprint_names_content_order_and_batching():
    def fingerprint(records=RECORDS, batch_size=3, seed=1, remainder="drop", transform=None):
        return train_batches(records, batch_size, seed=seed, remainder=remainder, transform=transform).fingerprint

    changed = [*RECORDS[:-1], {**RECORDS[-1], "targets": np.int32(11)}]
    renamed = [{("x" if k == "inputs" else k): v for k, v in r.items()} for r in RECORDS]
    retyped = [{**r, "targets": np.int16(r["targets"])} for r in RECORDS]
    others = [
        fingerprint(changed), fingerprint(renamed), fingerprint(retyped), fingerprint(RECORDS[::-1]), fingerprint(batch_size=4),
        fingerprint(seed=2), fingerprint(remainder="pad"), fingerprint(transform=noisy),
        ordered_batches(RECORDS, 3).fingerprint,
        fingerprint(subset(RECORDS, range(10))), fingerprint(subset(RECORDS, range(1, 11))),
    ]  # fmt: skip
    assert len({fingerprint(), *others}) == 1 + len(others)
    assert fingerprint() == fingerprint([dict(r) for r in RECORDS])


def test_grains_state_fits_any_pipeline_and_only_the_fingerprint_tells():
    """The trap: grain takes up a position of another batch size without a word, and goes on elsewhere in the data."""
    small = grain.MapDataset.range(12).batch(2).to_iter_dataset().__iter__()
    next(small)
    large = grain.MapDataset.range(12).batch(4).to_iter_dataset().__iter__()
    large.set_state(small.get_state())
    assert next(large).tolist() == [4, 5, 6, 7]  # 2 and 3 were never seen
    ours = [train_batches(RECORDS, size, seed=0, remainder="drop") for size in (2, 4)]
    ours[1].open().set_state(ours[0].position(1))
    assert ours[0].fingerprint != ours[1].fingerprint


def test_grain_straddles_epochs_where_it_batches_after_repeating_and_ours_do_not():
    straddling = grain.MapDataset.range(5).repeat(2).batch(3)
    assert straddling[1].tolist() == [3, 4, 0]
    batches = drawn(train_batches(numbers(5), 3, seed=0, remainder="pad"), 4)
    assert [len(targets(batch)) for batch in batches] == [3, 2, 3, 2]


def test_grains_neighbouring_seeds_share_their_orders_and_ours_do_not():
    """The trap: grain's shuffle adds the epoch to the seed."""
    shuffled = [grain.MapDataset.range(32).shuffle(seed).repeat(2) for seed in (1, 2)]
    assert [shuffled[0][i] for i in range(32, 64)] == [shuffled[1][i] for i in range(32)]
    first, second = (drawn(train_batches(numbers(32), 32, seed=seed, remainder="drop"), 2) for seed in (1, 2))
    assert first[1]["targets"].tolist() != second[0]["targets"].tolist()


def test_streams_start_no_process_and_need_no_flags():
    """The trap: grain's process prefetch forks beside JAX, and wants absl's flags parsed, which no notebook does."""
    from absl import flags

    parsed = flags.FLAGS.is_parsed()
    flags.FLAGS.unparse_flags()
    try:
        drawn(train_batches(RECORDS, 3, seed=0, remainder="drop", threads=2), 3)
    finally:
        if parsed:
            flags.FLAGS.mark_as_parsed()
    assert not multiprocessing.active_children()


def test_a_grain_data_set_is_a_source_and_an_endless_one_is_refused():
    data_set = grain.MapDataset.range(6).map(lambda i: {"targets": np.int32(i)})
    batches = drawn(train_batches(data_set, 2, seed=0, remainder="drop"), 3)
    assert sorted(t for batch in batches for t in targets(batch)) == list(range(6))
    with pytest.raises(ValueError, match="repeats without end"):
        as_source(data_set.repeat())


def test_an_error_while_reading_reaches_the_one_who_asks():
    class Broken:
        fingerprint = "broken"

        def __len__(self):
            return 4

        def gather(self, rows, epoch):
            raise OSError("disk gone")

    for threads in (0, 2):
        with pytest.raises(ValueError, match=r"record \d of broken cannot be read \(disk gone\)"):
            next(train_batches(Broken(), 2, seed=0, remainder="drop", threads=threads).open())


def test_positions_reach_far_without_drawing():
    batches = train_batches(numbers(7), 2, seed=0, remainder="drop")
    far = drawn(batches, 2, batches.position(3 * 10**12))
    assert all(len(targets(batch)) == 2 for batch in far)
    assert len(list(itertools.islice(batches.open(), 10))) == 10 < sys.maxsize


class Damaged:
    """Ten records, of which one cannot be read, one holds NaN, and one does where its mask is 0."""

    fingerprint = "damaged"

    def __len__(self):
        return 10

    def gather(self, rows, epoch):
        if 3 in rows:
            raise OSError("checksum")
        inputs = np.where(np.isin(rows, (5, 7)), np.nan, rows).astype(np.float32)
        return {"inputs": inputs, "mask": (rows != 7).astype(np.float32)}


@pytest.mark.parametrize(("size", "says"), [(4, r"record 3 of damaged cannot be read \(checksum\)"),
                                            (3, "record 3 of damaged"), (1, "record 3")])  # fmt: skip
def test_a_bad_record_is_named_by_source_and_index(size, says):
    with pytest.raises(ValueError, match=says):
        list(ordered_batches(Damaged(), size).open())
    with pytest.raises(ValueError, match="record 1 of subset .* of damaged is not finite: 'inputs' holds NaN"):
        list(ordered_batches(subset(Damaged(), [4, 5]), 2).open())


def test_bad_records_are_skipped_and_counted_and_all_others_seen_once(caplog):
    batches = list(ordered_batches(Damaged(), 4, bad_records="skip").open())
    inputs, mask = (np.concatenate([b[name] for b in batches]) for name in ("inputs", "mask"))
    assert sorted(inputs[mask != 0]) == [0, 1, 2, 4, 6, 8, 9]
    told = [record.message for record in caplog.records]
    assert told == ["record 3 of damaged cannot be read (checksum): skipped; 1 so far",
                    "record 5 of damaged is not finite: 'inputs' holds NaN or infinity: skipped; 2 so far"]  # fmt: skip
    with pytest.raises(ValueError, match="holds no record that can be read"):
        list(ordered_batches(subset(Damaged(), [3, 5]), 2, bad_records="skip").open())
    with pytest.raises(ValueError, match="bad_records: given 'ignore', allowed 'raise' or 'skip'"):
        ordered_batches(Damaged(), 4, bad_records="ignore")
