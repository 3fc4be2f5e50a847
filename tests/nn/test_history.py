"""Hashed n-grams, and what followed the same n-gram before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.nn.functional import functional
from research.nn.history import History
from research.nn.induction import CopyHead, followed, followed_at
from research.nn.ngrams import NGramEmbed, hashes

KEY = jax.random.key(0)


def tokens(seed, batch=3, length=40, vocab=3):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, vocab)


def brute(codes, n):
    """What followed the latest earlier occurrence of the last n codes, by trying them all."""
    codes = np.asarray(codes)
    out = np.zeros(codes.shape, np.int32)
    for b, row in enumerate(codes):
        for t in range(n - 1, len(row)):
            for s in range(t - 1, n - 2, -1):
                if (row[s - n + 1 : s + 1] == row[t - n + 1 : t + 1]).all():
                    out[b, t] = row[s + 1]
                    break
    return out


@pytest.mark.parametrize("n", [1, 2, 4])
def test_followed_is_what_a_search_finds(n):
    codes = tokens(n) + 1
    expected = brute(codes, n)
    assert expected.any() and not expected.all()
    np.testing.assert_array_equal(jax.jit(followed, static_argnums=1)(codes, n), expected)


@pytest.mark.parametrize("index, length", [(0, 5), (17, 1), (30, 10)])
def test_followed_at_is_a_part_of_followed_whatever_lies_beyond(index, length):
    codes = tokens(1) + 1
    filled = jnp.where(jnp.arange(40)[None] < index + length, codes, 0)
    part = jax.jit(followed_at, static_argnums=(1, 3))(filled, 3, jnp.int32(index), length)
    np.testing.assert_array_equal(part, brute(codes, 3)[:, index : index + length])


def test_hashes_tell_n_grams_apart_by_order_and_by_what_lies_before_the_beginning():
    codes = jnp.array([[1, 2, 1, 2, 2, 1]])
    one = np.asarray(hashes(codes, 2))[0]
    assert one[1] == one[3]
    assert len({int(h) for h in one}) == 4  # 01, 12 (twice), 21 (twice), 22
    assert one[2] == one[5]


def test_n_gram_embeddings_read_the_last_n_tokens_and_no_others():
    f = functional(lambda r: NGramEmbed((2, 3), 10, 4, 5, dtype="float32", rngs=r))
    variables = f.init(KEY)
    codes = tokens(2) + 1
    base = f.apply(variables, codes)[0]
    changed = f.apply(variables, codes.at[:, 10].set(4))[0]
    differs = np.abs(base - changed).max((0, 2)) > 0
    np.testing.assert_array_equal(np.flatnonzero(differs), [10, 11, 12])


@pytest.mark.parametrize("ngrams, induction", [((2, 3), ()), ((), (1, 2)), ((2, 3), (1, 2))])
def test_decoding_a_history_equals_reading_it_whole(ngrams, induction):
    f = functional(lambda r: History(ngrams, 6, 4, induction, 3, 5, dtype="float32", rngs=r))
    variables = f.init(KEY)
    given = tokens(3, length=12)
    whole = jax.jit(f.apply)(variables, given)[0]
    decode = jax.jit(lambda *args: f.apply(*args, method="decode")[0])
    spec = f.ask("cache_specs", 3, 12)
    cache, at = jnp.zeros(spec.shape, spec.dtype), 0
    for size in (5, 1, 1, 5):
        part, cache = decode(variables, given[:, at : at + size], cache, jnp.int32(at))
        for a, b in zip(part, whole, strict=True):
            np.testing.assert_allclose(a, b[:, at : at + size], atol=1e-6)
        at += size


def test_copying_adds_each_gate_to_the_logit_of_what_followed():
    f = functional(lambda r: CopyHead(2, 4, dtype="float32", rngs=r))
    variables = f.init(KEY)
    variables["params"]["gate"]["kernel"] = jax.random.normal(KEY, (4, 2))
    hidden, logits = jax.random.normal(KEY, (1, 3, 4)), jnp.zeros((1, 3, 5))
    said = jnp.array([[[1, 1], [0, 5], [0, 0]]])  # codes: token + 1, 0 for none
    votes = np.asarray(hidden @ variables["params"]["gate"]["kernel"])[0] + 0.3
    expected = np.zeros((3, 5))
    expected[0, 0], expected[1, 4] = votes[0].sum(), votes[1, 1]
    np.testing.assert_allclose(f.apply(variables, logits, hidden, said)[0][0], expected, atol=1e-5)
