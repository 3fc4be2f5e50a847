"""A corpus as windows of tokens: cut anew every epoch to train on, every token once to evaluate on.

Both are Sources of {"inputs": int32 [length], "targets": int32 [length], "mask": float32 [length]}; targets are inputs shifted
by one, and the mask is 1 on targets that count.
"""

from __future__ import annotations

import numpy as np

from research.data.determinism import mixed
from research.data.streams import Record, Source
from research.data.text import Corpus


class _RandomWindows:
    def __init__(self, corpus: Corpus, length: int, seed: int):
        self._tokens, self._length, self._seed = corpus.tokens, length, seed
        self.fingerprint = f"random windows length={length} seed={seed} {corpus.fingerprint}"

    def __len__(self) -> int:
        return -(-len(self._tokens) // self._length)

    def gather(self, rows: np.ndarray, epoch: int) -> Record:
        count = len(self._tokens)
        places_BxT = rows[:, None] * self._length + np.arange(self._length)
        shift = mixed(self._seed, epoch) % count
        around_BxT1 = np.append(places_BxT[:, :1] - 1, places_BxT, axis=1) + shift
        tokens_BxT1 = self._tokens.take(around_BxT1, mode="wrap").astype(np.int32)
        mask_BxT = (places_BxT < count).astype(np.float32)
        return {"inputs": tokens_BxT1[:, :-1], "targets": tokens_BxT1[:, 1:], "mask": mask_BxT}


def random_windows(corpus: Corpus, length: int, *, seed: int) -> Source:
    """Windows of `length` tokens to train on, for `train_batches` (which shuffles them).

    The corpus is taken as a ring and cut into ceil(n / length) windows, from another place every epoch, which depends on seed
    and epoch alone. So every token is a target exactly once an epoch (what the last window has too much is masked), and over
    the epochs it is met at every distance from a window's beginning.

    Raises ValueError for a corpus shorter than one window.
    """
    _check_length(length)
    if len(corpus.tokens) < length:
        raise ValueError(f"length: given {length}, allowed at most {len(corpus.tokens)}, the tokens of corpus {corpus.name!r}")
    return _RandomWindows(corpus, length, seed)


class _ScoredWindows:
    def __init__(self, corpus: Corpus, length: int, context: int):
        self._tokens, self._start = corpus.tokens, corpus.start
        self._length, self._stride = length, length - context
        self.fingerprint = f"scored windows length={length} context={context} {corpus.fingerprint}"

    def __len__(self) -> int:
        return 1 + max(0, -(-(len(self._tokens) - self._length) // self._stride))

    def gather(self, rows: np.ndarray, epoch: int) -> Record:
        count, length = len(self._tokens), self._length
        ends_B = np.minimum(length + rows * self._stride, count)
        scored_from_B = np.where(rows == 0, 0, length + (rows - 1) * self._stride)
        places_BxT = np.maximum(ends_B - length, 0)[:, None] + np.arange(length)
        before_BxT = self._tokens.take(places_BxT - 1, mode="clip").astype(np.int32)
        counts_BxT = (places_BxT >= scored_from_B[:, None]) & (places_BxT < count)
        return {
            "inputs": np.where(places_BxT == 0, self._start, before_BxT).astype(np.int32),
            "targets": self._tokens.take(places_BxT, mode="clip").astype(np.int32),
            "mask": counts_BxT.astype(np.float32),
        }


def scored_windows(corpus: Corpus, length: int, context: int) -> Source:
    """The whole corpus as one stream to evaluate on, for `ordered_batches`: every token counts exactly once.

    The first window scores all of its `length` tokens; the corpus's first token is predicted from `corpus.start`. Every later
    window scores its last `length - context` tokens, so that each of them is predicted from more than `context` tokens before
    it. The last window is moved back to end with the corpus, which only adds context. A corpus shorter than `length` is one
    window, masked past its end.

    Raises ValueError unless 0 <= context < length.
    """
    _check_length(length)
    if not 0 <= context < length:
        raise ValueError(f"context: given {context}, allowed 0 to {length - 1} for windows of {length}")
    return _ScoredWindows(corpus, length, context)


def _check_length(length: int) -> None:
    if length < 1:
        raise ValueError(f"length: given {length}, allowed 1 and more")
