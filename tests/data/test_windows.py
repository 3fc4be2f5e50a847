"""Windows: every token a target exactly once an epoch (training), exactly once at all (evaluation)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.data.documents import Document
from research.data.streams import batches_per_epoch, ordered_batches, train_batches
from research.data.text import corpus
from research.data.tokenizer import bytes_tokenizer
from research.data.windows import random_windows, scored_windows


def corpus_of(count: int):
    """Tokens that name their own place, as far as 256 goes."""
    content = np.arange(count).astype(np.uint8).tobytes()
    return corpus(
        [Document("d", content[: count // 2], b""), Document("e", content[count // 2 :], b"")], bytes_tokenizer(), "c"
    )


def gathered(source, epoch=0):
    return source.gather(np.arange(len(source)), epoch)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 250), st.integers(1, 60), st.integers(0, 59), st.integers(1, 9))
def test_every_token_is_scored_exactly_once_with_its_context(count, length, context, batch_size):
    context = min(context, length - 1)
    held = corpus_of(count)
    batches = list(ordered_batches(scored_windows(held, length, context), batch_size).open())
    scored: list[int] = []
    for batch in batches:
        assert batch["inputs"].shape == batch["targets"].shape == batch["mask"].shape == (batch_size, length)
        assert (batch["inputs"].dtype, batch["targets"].dtype, batch["mask"].dtype) == (np.int32, np.int32, np.float32)
        for inputs, targets, mask in zip(batch["inputs"], batch["targets"], batch["mask"], strict=True):
            for place in np.flatnonzero(mask):
                token = int(targets[place])
                before = inputs[: place + 1]  # what the model may see
                expected = np.append(held.start, held.tokens)[: token + 1][-len(before) :]
                np.testing.assert_array_equal(before, expected)
                assert len(before) > context or len(before) == token + 1
                scored.append(token)
    assert scored == list(range(count))  # each byte once, in order
    if count >= length:  # the last window is moved back, never short of context
        last = batches[-1]["targets"][(len(scored_windows(held, length, context)) - 1) % batch_size]
        assert last.tolist() == list(range(count - length, count))


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 250), st.integers(1, 60), st.integers(0, 9), st.integers(0, 5))
def test_every_token_is_a_target_once_an_epoch_of_training(count, length, seed, epoch):
    length = min(length, count)
    held = corpus_of(count)
    source = random_windows(held, length, seed=seed)
    windows = gathered(source, epoch)
    assert len(source) == -(-count // length) == len(windows["inputs"])
    counts = windows["mask"] > 0
    assert sorted(windows["targets"][counts].tolist()) == list(range(count))
    np.testing.assert_array_equal(windows["inputs"], (windows["targets"] - 1) % count)  # shifted by one, on a ring
    assert (windows["inputs"].dtype, windows["targets"].dtype, windows["mask"].dtype) == (np.int32, np.int32, np.float32)


def test_windows_are_cut_elsewhere_every_epoch_and_for_every_seed():
    first = {(seed, epoch): int(gathered(random_windows(corpus_of(250), 10, seed=seed), epoch)["targets"][0, 0])
             for seed in range(3) for epoch in range(8)}  # fmt: skip
    assert len(set(first.values())) > 15
    again = random_windows(corpus_of(250), 10, seed=1)
    assert first[1, 5] == int(again.gather(np.asarray([0]), 5)["targets"][0, 0])


@pytest.mark.parametrize("remainder", ["drop", "pad"])
def test_training_batches_of_windows_cover_the_corpus_and_resume(remainder):
    held = corpus_of(203)
    source = random_windows(held, 10, seed=4)  # 21 windows
    batches = train_batches(source, 4, seed=4, remainder=remainder)
    per_epoch = batches_per_epoch(source, 4, remainder=remainder)
    iterator = batches.open()
    for _ in range(2):
        epoch = [next(iterator) for _ in range(per_epoch)]
        seen = np.concatenate([batch["targets"][batch["mask"] > 0] for batch in epoch])
        assert len(np.unique(seen)) == len(seen)
        assert len(seen) == 203 if remainder == "pad" else 203 - 10 <= len(seen) <= 203 - 3
    for step in (0, 1, per_epoch - 1, per_epoch, per_epoch + 1):
        straight, resumed = batches.open(), batches.open()
        for _ in range(step):
            next(straight)
        resumed.set_state(batches.position(step))
        for _ in range(3):
            a, b = next(straight), next(resumed)
            assert all(np.array_equal(a[name], b[name]) for name in a)


def test_fingerprints_tell_lengths_contexts_and_corpora_apart():
    random = [(50, 10, 0), (50, 5, 0), (51, 10, 0), (50, 10, 1)]
    made = [random_windows(corpus_of(count), length, seed=seed) for count, length, seed in random]
    made += [scored_windows(corpus_of(50), 10, context) for context in (0, 5)]
    assert len({source.fingerprint for source in made}) == len(made)


def test_tokens_of_a_large_vocabulary_survive():
    large = corpus_of(40)
    wide = type(large)("w", np.arange(40, dtype=np.uint32) + 100_000, large.offsets, large.documents, 160, large.tokenizer)
    assert gathered(scored_windows(wide, 40, 0))["targets"][0].tolist() == list(range(100_000, 100_040))
