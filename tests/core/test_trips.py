"""Passes through loops are counted as they run, where they can be known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.attention import block_mask, masks, sparse_attention
from pallas_kernels.attention.xla_loops import AT_ONCE
from research.core.flops import count_flops
from research.core.trips import trips

A = jnp.ones((3, 3))
PASS = 2 * 3 * 3 * 3


def times(n, x):
    return jax.lax.fori_loop(0, n, lambda i, x: x @ x, x)


def over_list(x):
    """Rows of 0, 2, 0, 3, 1 passes, as read from an array."""
    return jax.lax.scan(lambda x, n: (times(n + 0, x), None), x, jnp.array([0, 2, 0, 3, 1]))[0]


def nested(x):
    """1 + 2 + 3 passes, then as many again in a loop around them."""

    def once(x):
        return jax.lax.fori_loop(1, jnp.array(4), lambda i, x: times(i, x), x)

    return jax.lax.fori_loop(0, jnp.array(2), lambda i, x: once(x), x)


def halved(x):
    """Until a number that is carried beside is small; 40, 20, 10, 5, 2: 5 passes."""
    return jax.lax.while_loop(lambda c: c[0] > 1, lambda c: (c[0] // 2, c[1] @ c[1]), (jnp.array(40), x))[1]


def of_data(x):
    """The end is data: the body counts once, and one inside of it likewise."""
    return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: times(jnp.array(3), x) @ x, x)


def one_known_too_late(x):
    """The end is known at first, and read from data later."""
    return jax.lax.scan(lambda c, _: ((times(c[1], c[0]), c[0][0, 0].astype(int)), None), (x, 5), None, 7)[0][0]


COUNTED = {
    "over a list": (over_list, 6),
    "jit in between": (lambda x: jax.jit(over_list)(x) + jax.jit(over_list)(x), 12),
    "computed again": (jax.checkpoint(over_list), 6),
    "nested": (nested, 12),
    "halved": (halved, 5),
    "of data": (of_data, 2),
    "of no steps": (lambda x: jax.lax.scan(lambda x, n: (times(n, x), None), x, jnp.zeros(0, int))[0], 0),
    "an end that becomes data": (one_known_too_late, 7),
    "mapped": (lambda x: jax.lax.map(over_list, jnp.stack([x, x])), 12),
    "in the longest branch of a cond": (lambda x: jax.lax.cond(x[0, 0] > 0, halved, lambda x: x, x), 1),
}


@pytest.mark.parametrize("name", COUNTED)
def test_a_loop_counts_as_often_as_it_runs_where_that_is_known(name):
    function, passes = COUNTED[name]
    assert count_flops(function, A) == passes * PASS
    assert count_flops(jax.jit(function), jax.ShapeDtypeStruct(A.shape, A.dtype)) == passes * PASS


def test_nothing_is_known_of_a_loop_over_data():
    assert trips(jax.make_jaxpr(of_data)(A)) == {}
    assert list(trips(jax.make_jaxpr(halved)(A)).values()) == [5]


def attention(mask, **arguments):
    return lambda q, k, v: sparse_attention(q, k, v, mask, implementation="xla", **arguments)


def visited(mask):
    """Blocks, several at a time."""
    each = (block_mask(mask, 1024, 1024, 128, 128).table() > 0).sum(1)
    return (-(-each // AT_ONCE) * AT_ONCE).sum()


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_attention_by_heads_of_their_own_counts_what_each_visits(backward):
    shared = [masks.full(), masks.causal(), masks.window(127, 0), masks.causal()]
    q, k = (jax.ShapeDtypeStruct((2, 1024, heads, 16), jnp.float32) for heads in (4, 2))

    def flops(mask):
        run = attention(mask)
        return count_flops(jax.grad(lambda *a: run(*a).sum(), (0, 1, 2)) if backward else run, q, k, k)

    products = (7 if backward else 2) * 2 * 128 * 128 * 16 * 2  # of a block's scores; two sequences
    by_head = block_mask(masks.per_head(*shared), 1024, 1024, 128, 128)
    assert flops(by_head) == products * sum(map(visited, shared))
    every = block_mask(masks.per_head(*[masks.full()] * 4), 1024, 1024, 128, 128)
    assert flops(every) == flops(masks.full()) == products * 4 * 64


def test_attention_at_an_offset_that_is_data_is_counted_once_a_row():
    q, k = (jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32) for length in (128, 1024))
    at = jax.ShapeDtypeStruct((), jnp.int32)
    got = count_flops(lambda q, k, v, at: attention(masks.causal(), q_offset=at)(q, k, v), q, k, k, at)
    assert got == 2 * 2 * 128 * 128 * AT_ONCE * 16
