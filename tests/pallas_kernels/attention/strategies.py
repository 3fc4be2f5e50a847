"""What hypothesis draws: specifications of masks, and calls of attention."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.pallas_kernels.attention.cases import AND, CAUSAL, NOT, OR, Case

LEAVES = st.one_of(
    st.just(CAUSAL),
    st.just(["full"]),
    st.tuples(st.just("window"), st.none() | st.integers(0, 40), st.none() | st.integers(0, 40)).map(list),
    st.tuples(st.just("prefix"), st.integers(0, 50)).map(list),
    st.tuples(st.just("strided"), st.integers(1, 9)).map(list),
    st.tuples(st.just("block_window"), st.integers(1, 20), st.integers(0, 2), st.integers(0, 2)).map(list),
    st.tuples(st.just("dilated"), st.integers(0, 4), st.integers(0, 4), st.integers(1, 6)).map(list),
    st.integers(0, 20).map(lambda n: ["global", n]),
    st.lists(st.integers(0, 60), min_size=1, max_size=20).map(lambda which: ["global", which]),
    st.lists(st.integers(0, 3), min_size=40, max_size=40).map(lambda ids: ["document", (3 * ids)[:103]]),
    st.lists(st.integers(0, 3), min_size=40, max_size=40).map(lambda ids: ["document", sorted(3 * ids)[:103]]),
    st.tuples(st.just("function"), st.integers(0, 5), st.integers(0, 7)).map(list),
    st.integers(0, 99).map(lambda key: ["random", key, 8, 2, 103, 4]),
)
SPECS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(st.sampled_from([AND, OR]), inner, inner).map(list),
        inner.map(lambda spec: [NOT, spec]),
    ),
    max_leaves=4,
)
BY_HEAD = st.lists(LEAVES.filter(lambda spec: spec[0] not in ("function", "random")), min_size=4, max_size=4).map(
    lambda specs: ["heads", *specs]
)
SHAPES = [(67, 67), (31, 67), (67, 31), (1, 67), (17, 5)]
BLOCKS = [(16, 32), (32, 16)]


def ids(length: int, rows: int = 2) -> st.SearchStrategy:
    row = st.lists(st.integers(0, 2), min_size=length, max_size=length)
    return st.lists(row | row.map(sorted), min_size=rows, max_size=rows).map(lambda rows: tuple(map(tuple, rows)))


@st.composite
def calls(draw):
    q_len, kv_len = draw(st.sampled_from(SHAPES))
    return Case(
        draw(SPECS | BY_HEAD),
        q_len,
        kv_len,
        kv_heads=draw(st.sampled_from([1, 2, 4])),
        offset=(draw(st.sampled_from([0, 0, 36])),),
        traced=draw(st.booleans()),
        segments=draw(st.none() | st.tuples(ids(q_len), ids(kv_len))),
        sinks=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, 2.0])),
        mod=draw(st.sampled_from([None, "alibi", "learned"])),
        blocks=draw(st.sampled_from([None, *BLOCKS])),
    )
