"""The algebra of masks: every pair and the bounds of every rectangle, by brute force; values that compare by what made them."""

from __future__ import annotations

import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from pallas_kernels.attention import block_mask, masks
from tests.pallas_kernels.attention import oracle
from tests.pallas_kernels.attention.cases import AND, CAUSAL, NOT, OR, TABLES, made, plain
from tests.pallas_kernels.attention.strategies import BY_HEAD, SPECS

N = 13  # positions; small, so that every rectangle can be looked at
IDS = [[0, 0, 0, 1, 1, 3, 3, 3, 3, 4, 4, 7, 7], [2] * 6 + [5] * 7]
MIXED = [0, 2, 2, 1, 0, 0, 2, 1, 1, 1, 0, 2, 0]

SPECIFIED = {
    "full": ["full"],
    "causal": CAUSAL,
    "window": ["window", 3, 2],
    "window of nothing but oneself": ["window", 0, 0],
    "window without end on the left": ["window", None, 2],
    "window without end on the right": ["window", 4, None],
    "window without ends": ["window", None, None],
    "block window": ["block_window", 3, 1, 0],
    "prefix": ["prefix", 5],
    "prefix of nothing": ["prefix", 0],
    "prefix of all": ["prefix", 40],
    "document": ["document", IDS[0]],
    "document by sequence": ["document", IDS],
    "document, mixed": ["document", MIXED],
    "document shorter than the sequence": ["document", [0, 0, 1, 1, 1, 2]],
    "strided": ["strided", 4],
    "strided by one": ["strided", 1],
    "dilated": ["dilated", 2, 1, 3],
    "global": ["global", 2],
    "global positions": ["global", [2, 3, 4, 9]],
    "many global positions": ["global", [*range(9), *range(20, 40)]],
    "blocks": ["blocks", [[[True, False, True], [False, True, True], [True, True, True]]], 5],
    "blocks by head": ["blocks", [[row[:5] for row in table[:5]] for table in TABLES], 3],
    "random": ["random", 5, 3, 2, N, 0],
    "random by head": ["random", 5, 3, 2, N, 4],
    "bigbird": ["bigbird", 1, 2, N],
    "function": ["function", 2, 4],
    "and": [AND, CAUSAL, ["window", 3, 2]],
    "or": [OR, ["prefix", 3], ["window", 1, 1]],
    "not": [NOT, ["window", 3, 2]],
    "not global": [NOT, ["global", [2, 3, 4, 9]]],
    "deep": [AND, [NOT, [OR, ["strided", 3], ["document", MIXED]]], [OR, CAUSAL, ["prefix", 6]]],
    "by head": ["heads", CAUSAL, ["window", 2, 2], [NOT, CAUSAL], CAUSAL],
    "by head and sequence": [AND, ["heads", CAUSAL, ["full"], ["full"], CAUSAL], ["document", IDS]],
}
BOUNDED_EXACTLY = [name for name, spec in SPECIFIED.items() if made(spec).exact]


def indices(xp):
    return [xp.arange(n).reshape([-1 if i == axis else 1 for i in range(4)]) for axis, n in enumerate((2, 4, N, N))]


def looked_at(mask):
    return np.broadcast_to(np.asarray(mask(*indices(np))), (2, 4, N, N))


@pytest.mark.parametrize("name", SPECIFIED)
def test_every_pair_is_as_defined(name):
    """For NumPy's indices and for JAX's, traced or not, and as wide as the indices are together."""
    mask, expected = made(SPECIFIED[name]), oracle.table(plain(SPECIFIED[name]), 2, 4, N, N)
    got = mask(*indices(np))
    assert got.dtype == bool
    np.testing.assert_array_equal(np.broadcast_to(got, expected.shape), expected)
    traced = jax.jit(lambda *i: mask(*i))(*indices(jnp))
    assert traced.dtype == bool and traced.shape[2:] == (N, N)
    np.testing.assert_array_equal(np.broadcast_to(traced, expected.shape), expected)
    for b, h in ((0, 0), (1, 3)):
        np.testing.assert_array_equal(np.broadcast_to(mask(b, h, *(i[0, 0] for i in indices(np)[2:])), (N, N)), expected[b, h])
        assert bool(mask(b, h, 7, 4)) == expected[b, h, 7, 4]


def rectangles():
    ends = [(a, b) for a in range(N) for b in range(a, N)]
    pairs = np.array([(*q, *kv) for q, kv in itertools.product(ends, ends)])
    return [pairs[:, i] for i in range(4)]


def truth(table, q_first, q_last, kv_first, kv_last):
    """(any, all) of rectangles of a table of pairs."""
    sums = np.pad(table.astype(int).cumsum(0).cumsum(1), [(1, 0), (1, 0)])
    seen = sums[q_last + 1, kv_last + 1] - sums[q_first, kv_last + 1] - sums[q_last + 1, kv_first] + sums[q_first, kv_first]
    return seen > 0, seen == (q_last - q_first + 1) * (kv_last - kv_first + 1)


def check_bounds(mask, exact):
    table, ends = looked_at(mask), rectangles()
    for b, h in itertools.product(range(2 if mask.batch else 1), range(4 if mask.heads else 1)):
        some, every = (np.broadcast_to(x, ends[0].shape) for x in mask.bounds(b, h, *ends))
        assert some.dtype == bool and every.dtype == bool
        any_seen, all_seen = truth(table[b, h], *ends)
        assert (some | ~any_seen).all(), "a rectangle with pairs is said to be empty"
        assert (~every | all_seen).all(), "a rectangle with gaps is said to be full"
        if exact:
            np.testing.assert_array_equal(some, any_seen)
            np.testing.assert_array_equal(every, all_seen)
    return ends


@pytest.mark.parametrize("name", SPECIFIED)
def test_bounds_of_every_rectangle_are_sound_and_exact_where_that_is_said(name):
    mask = made(SPECIFIED[name])
    ends = check_bounds(mask, mask.exact)
    some, every = mask.bounds(0, 0, *ends)
    traced = mask.bounds(0, 0, *(jnp.asarray(end, jnp.int32) for end in ends))
    for a, b in zip((some, every), traced, strict=True):
        np.testing.assert_array_equal(np.broadcast_to(a, ends[0].shape), np.broadcast_to(b, ends[0].shape))


def test_what_users_sort_at_length_is_bounded_exactly():
    """Else every pair of long sequences would be looked at."""
    assert {"causal", "window", "block window", "prefix", "strided", "random", "global positions"} - set(BOUNDED_EXACTLY) == {
        "global positions"  # of queries, or of keys
    }


def test_bounds_of_ordered_documents_leave_nothing_open():
    """Though they do not claim it: packed documents of 128k tokens are looked at along their borders only."""
    check_bounds(masks.document(IDS[0]), exact=True)


@settings(max_examples=60)
@given(spec=SPECS | BY_HEAD)
def test_what_hypothesis_combines_is_as_defined(spec):
    mask = made(spec)
    np.testing.assert_array_equal(looked_at(mask), oracle.table(plain(spec), 2, 4, N, N))
    check_bounds(mask, mask.exact)


@pytest.mark.parametrize("name", SPECIFIED)
def test_equal_masks_are_equal_values(name):
    spec = SPECIFIED[name]
    mask = made(spec)
    if "function" in oracle.kinds(spec):
        assert mask == mask and hash(mask) == hash(mask) and mask != made(spec)
        assert masks.from_function(mask.function) == mask
        return
    again = made(spec)
    assert mask is not again and mask == again and hash(mask) == hash(again)
    assert len({mask, again, ~mask, mask & again, mask | again}) == 4
    assert ~~mask == mask
    assert pickle.loads(pickle.dumps(mask)) == mask
    assert isinstance(repr(mask), str) and len(repr(mask)) < 400


def test_different_masks_are_different_values():
    """One for every specification, and for every way in which a value can differ."""
    distinct = [made(spec) for spec in SPECIFIED.values()]
    ids = np.array(IDS[0])
    distinct += [
        masks.window(3, 1), masks.window(2, 2), masks.prefix(4), masks.global_tokens(3), masks.strided(5),
        masks.document(ids + 1), masks.document(ids.astype(np.int8)), masks.document(ids.reshape(1, -1)),
        masks.random_blocks(6, 3, 2, N), masks.random_blocks(5, 3, 1, N), masks.block_window(2, 1, 0),
        masks.causal() & masks.prefix(3), masks.causal() | masks.prefix(3), masks.prefix(3) | masks.causal(),
        masks.per_head(masks.causal(), masks.full()), masks.per_head(masks.full(), masks.causal()),
    ]  # fmt: skip
    assert len(set(distinct)) == len(distinct)


def test_a_masks_arrays_cannot_be_changed_from_outside():
    """Neither through what it was made from: it is a value, and what was cached by it would be wrong."""
    ids = np.zeros(6, np.int64)
    mask = masks.document(ids)
    before = hash(mask)
    ids[:] = np.arange(6)
    assert bool(mask(0, 0, np.array(1), np.array(2))) and hash(mask) == before and mask == masks.document(np.zeros(6, int))


def test_random_blocks_draw_so_many_for_every_block_of_queries():
    """Without replacement, by head anew, equal for equal keys of any kind."""
    mask = masks.random_blocks(7, 4, 3, 40, heads=5)
    table = mask.table.values
    assert table.shape == (5, 10, 10) and (table.sum(-1) == 3).all()
    assert len({head.tobytes() for head in table}) == 5
    assert mask == masks.random_blocks(7, 4, 3, 40, heads=5) != masks.random_blocks(8, 4, 3, 40, heads=5)
    keys = [jax.random.key(7), jax.random.PRNGKey(7)]
    assert masks.random_blocks(keys[0], 4, 3, 40) == masks.random_blocks(keys[1], 4, 3, 40)
    assert masks.random_blocks(jax.random.key(8), 4, 3, 40) != masks.random_blocks(keys[0], 4, 3, 40)
    assert masks.random_blocks(0, 4, 10, 40).table.values.all()


def test_bigbird_is_a_window_global_blocks_and_random_ones():
    mask = masks.bigbird(1, 4, 64, window=3, global_blocks=2, count=3)
    blocks = looked_at_blocks = np.asarray(mask(0, 0, np.arange(0, 64, 4)[:, None], np.arange(0, 64, 4)[None]))
    np.testing.assert_array_equal(blocks, block_mask(mask, 64, 64, 4, 4).table() == 2)
    assert looked_at_blocks[:2].all() and looked_at_blocks[:, :2].all()
    assert all(blocks[i, max(0, i - 1) : i + 2].all() for i in range(16))
    assert 3 <= blocks[8].sum() <= 3 + 2 + 3
    assert masks.bigbird(1, 4, 64, count=0, global_blocks=0) == masks.block_window(4, 1, 1)


def test_heads_and_sequences_told_apart_must_agree():
    two, three = masks.per_head(*[masks.causal()] * 2), masks.per_head(*[masks.causal()] * 3)
    with pytest.raises(ValueError, match="masks of 2 and of 3 heads cannot be combined"):
        two & three
    with pytest.raises(ValueError, match="masks of 2 and of 3 heads cannot be combined"):
        two | ~three
    with pytest.raises(ValueError, match="masks of 2 and of 3 sequences cannot be combined"):
        masks.document(np.zeros((2, 4), int)) & masks.document(np.zeros((3, 4), int))
    with pytest.raises(ValueError, match="masks of 2 and of 3 sequences cannot be combined"):
        masks.per_head(masks.document(np.zeros((2, 4), int)), masks.document(np.zeros((3, 4), int)))
    with pytest.raises(ValueError, match="the same for all heads"):
        masks.per_head(two, masks.causal())
    assert (two & made(["function", 1, 2])).heads == 2 and made(["function", 1, 2]).heads == -1
    assert (masks.causal() & masks.document(IDS)).batch == 2 and (masks.causal() | masks.prefix(2)).heads == 0


def test_a_mask_of_arrays_tells_how_many_positions_it_is_of():
    """What is combined, the least of its parts."""
    nine, ten = masks.document(np.zeros(9, int)), masks.random_blocks(0, 5, 1, 10)
    assert (nine.length, ten.length, masks.document(np.zeros((2, 9), int)).length) == (9, 10, 9)
    assert masks.random_blocks(0, 16, 1, 100).length == 100  # not the end of the last block
    assert masks.bigbird(0, 4, 30).length == 30 and masks.bigbird(0, 4, 30, count=0).length is None
    for other in (masks.causal(), masks.full(), masks.prefix(3), masks.global_tokens([50]), made(["function", 1, 2])):
        assert other.length is None and (~other & ten).length == 10
    assert (nine | ten).length == (ten & ~nine).length == masks.per_head(ten, nine, masks.causal()).length == 9


def test_what_a_function_looks_at_is_read_off_its_program():
    """Also through what it computes; what it takes and does not use does not count."""
    table = np.arange(20) % 3 == 0
    cases = {
        "nothing": (lambda b, h, q, kv: True, (0, 0, True)),
        "pairs": (lambda b, h, q, kv: (q - kv) ** 2 < 9, (0, 0, True)),
        "heads": (lambda b, h, q, kv: q - kv < 2 * h, (-1, 0, True)),
        "sequences": (lambda b, h, q, kv: jnp.where(b > 0, q < kv, q > kv), (0, -1, True)),
        "unused": (lambda b, h, q, kv: (h + b, q < kv)[1], (0, 0, True)),
        "an array": (lambda b, h, q, kv: jnp.asarray(table)[q] | (kv == q), (0, 0, False)),
    }
    for name, (function, wanted) in cases.items():
        mask = masks.from_function(function)
        assert (mask.heads, mask.batch, mask.analytic) == wanted, name


def test_a_function_that_closes_over_a_traced_array_is_refused():
    """Whatever traces it: it would be cached, and used where that trace has ended."""

    def use(x):
        masks.from_function(lambda b, h, q, kv: x[q] < kv)
        return x.sum()

    for transform in (jax.jit, jax.vmap, jax.grad):
        with pytest.raises(ValueError, match="closes over a traced array"):
            transform(use)(jnp.ones((3, 3) if transform is jax.vmap else 3))
    with pytest.raises(ValueError, match="ids are traced"):
        jax.jit(lambda ids: masks.document(ids)(0, 0, ids, ids))(jnp.zeros(3, int))
    with pytest.raises(ValueError, match="key is traced"):
        jax.jit(lambda key: key if masks.random_blocks(key, 2, 1, 4) else key)(jax.random.key(0))


def test_masks_are_made_inside_of_jit_as_outside():
    """What the mask is made of is known then, though operations around it are traced."""

    def call(x):
        table = jnp.arange(8) % 3 == 0
        mask = masks.from_function(lambda b, h, q, kv: (q - kv) % 3 == 0) & masks.document(np.arange(8) // 4)
        return x + jnp.asarray(block_mask(mask, 8, 8, 4, 4).table()).sum() + table.sum()

    assert jax.jit(call)(0) == 2 * 1 + 3


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: masks.window(-1, 0), r"window's left: got -1, wanted a whole number >= 0"),
        (lambda: masks.window(0, 1.5), r"window's right: got 1.5, wanted a whole number"),
        (lambda: masks.window(True, 0), r"window's left: got True, wanted a whole number"),
        (lambda: masks.prefix(-2), r"prefix's n: got -2, wanted a whole number >= 0"),
        (lambda: masks.strided(0), r"strided's stride: got 0, wanted a whole number >= 1"),
        (lambda: masks.dilated(1, 1, 0), r"dilated's step: got 0"),
        (lambda: masks.block_window(0, 1, 1), r"block_window's size: got 0"),
        (lambda: masks.global_tokens([]), r"global_tokens: got no positions"),
        (lambda: masks.global_tokens([3, -1]), r"global_tokens' position: got -1"),
        (lambda: masks.document(np.zeros(3)), r"document's ids: got float64\[3\], wanted integers \[length\] or"),
        (lambda: masks.document(np.zeros((1, 1, 2), int)), r"document's ids: got int64\[1, 1, 2\]"),
        (lambda: masks.document(np.zeros(0, int)), r"document's ids: got int64\[0\]"),
        (lambda: masks.random_blocks(0, 4, 11, 40), r"count: got 11, wanted at most the 10 blocks of 4 in 40 keys"),
        (lambda: masks.bigbird(0, 4, 40, window=0), r"bigbird's window: got 0"),
        (lambda: masks.window(2**31, 0), r"window's left: got 2147483648, wanted a whole number <= 2147483647, which int32"),
        (lambda: masks.prefix(2**31), r"prefix's n: got 2147483648, wanted a whole number <= 2147483647"),
        (lambda: masks.global_tokens([2**31]), r"global_tokens' position: got 2147483648"),
        (lambda: masks.dilated(2**20, 0, 2**20), r"dilated's reach in positions: got 1099511627776"),
        (lambda: masks.strided(10**5000), r"strided's stride: got int, wanted a whole number <= 2147483647"),
        (lambda: masks.global_tokens(2.0), r"global_tokens: got 2.0, wanted a whole number or a sequence of them"),
        (lambda: masks.global_tokens(None), r"global_tokens: got None, wanted a whole number or a sequence of them"),
        (lambda: masks.global_tokens("ab"), r"global_tokens: got 'ab', wanted"),
        (lambda: masks.document([[0], [0, 1]]), r"document's ids: got \[\[0\], \[0, 1\]\], wanted integers \[length\] or"),
        (lambda: masks.document(None), r"document's ids: got object\[\]"),
        (lambda: masks.random_blocks(np.array([1.5]), 4, 1, 16), r"random_blocks' key: got float64\[1\], wanted an int or"),
        (lambda: masks.random_blocks(jnp.zeros(2), 4, 1, 16), r"random_blocks' key: got float32\[2\], wanted an int or"),
        (lambda: masks.random_blocks(0, 4, 1.0, 16), r"random_blocks' count: got 1.0"),
        (lambda: masks.bigbird(0, 4.5, 40), r"bigbird's size: got 4.5, wanted a whole number >= 1"),
        (lambda: masks.bigbird(0, 4, 40, count=-1), r"bigbird's count: got -1, wanted a whole number >= 0"),
        (lambda: masks.bigbird(0, 4, 40, count=None), r"bigbird's count: got None"),
        (lambda: masks.bigbird(0, 4, 40, global_blocks=None), r"bigbird's global_blocks: got None"),
        (lambda: masks.bigbird(0, 4, None, count=0), r"bigbird's length: got None"),
        (lambda: masks.bigbird(0.5, 4, 40, count=0), r"key: got 0.5, wanted an int or a JAX key"),
        (lambda: masks.bigbird(0, 4, 40, window=4), r"bigbird's window: got 4, wanted an odd .*; nearest: 3 or 5"),
        (lambda: masks.from_function(lambda b, h, q, kv: (q < kv,)), r"got tuple of bool\[\], wanted one bool\[\]"),
        (lambda: masks.from_function(lambda b, q, kv: q < kv), r"a mask_mod is called with \(batch, head, q_index, kv"),
        (lambda: masks.per_head(), r"per_head: got no masks"),
        (lambda: masks.per_head([masks.causal()]), r"per_head: got list, wanted masks"),
        (lambda: masks.from_function(lambda b, h, q, kv: kv <= q and kv > 2), r"wanted &, \|, ~ and jnp.where instead of"),
        (lambda: masks.from_function(lambda b, h, q, kv: np.ones((4, 4), bool)[q, kv]), r"tables as jnp.asarray\(table\)"),
        (lambda: masks.from_function(3), r"from_function: got 3, wanted a function"),
        (lambda: masks.from_function(lambda b, h, q, kv: q - kv), r"wanted one bool\[\]"),
        (lambda: masks.from_function(lambda b, h, q, kv: (q < kv, q)), r"wanted one bool\[\]"),
    ],
)  # fmt: skip
def test_what_is_no_mask_is_one_line(make, says):
    with pytest.raises(ValueError, match=says) as error:
        make()
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


FUNCTIONS = {
    "wraps": lambda b, h, q, kv: q * 1103515245 >= 0,  # int32, which NumPy's int64 would not
    "inverts": lambda b, h, q, kv: ~(h == 0) | (kv <= q),  # which a bool of Python would not
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_looked_at_as_kernels_compute_it(name):
    mask = masks.from_function(FUNCTIONS[name])
    b, h, q, kv = (x.astype(np.int32) for x in np.ogrid[:1, :2, :64, :64])
    expected = np.asarray(jnp.broadcast_to(jax.jit(mask)(b, h, q, kv), (1, 2, 64, 64)))
    assert expected.any() and not expected.all()
    blocks = block_mask(mask, 64, 64, 8, 8, heads=2)
    for head in range(blocks.heads):
        cut = expected[0, head].reshape(8, 8, 8, 8)
        np.testing.assert_array_equal(blocks.table(0, head), cut.any((1, 3)) * (1 + cut.all((1, 3))))


@pytest.mark.parametrize(
    "ids", [np.array([3, 3, 1, 0], np.uint8), np.array([0, 0, 2**32, 2**32]), np.array([-128, 127], np.int8)]
)
def test_documents_of_any_whole_numbers(ids):
    """Unsigned ones that fall are not sorted; long ones are not cut off."""
    mask = masks.document(np.repeat(ids, 8))
    expected = np.repeat(ids, 8)[:, None] == np.repeat(ids, 8)
    q, kv = (jnp.asarray(x, jnp.int32) for x in np.ogrid[: len(expected), : len(expected)])
    np.testing.assert_array_equal(mask(0, 0, q, kv), expected)
    table = block_mask(mask, len(expected), len(expected), 8, 8).table()
    np.testing.assert_array_equal(table, 2 * (ids[:, None] == ids))


def test_sizes_of_any_whole_numbers():
    mask = masks.window(np.uint8(5), np.int8(0))
    assert mask == masks.window(5, 0) and mask(0, 0, 3, 1)


def test_a_mask_without_its_methods_is_none():
    """Else a missing one would look like what an implementation does not support."""

    class Unbounded(masks.Mask):
        def __call__(self, batch, head, q_index, kv_index):
            return kv_index <= q_index

    with pytest.raises(TypeError, match="abstract.*bounds"):
        Unbounded()


def test_a_mask_is_neither_true_nor_false():
    """Else `a and b` would be b."""
    for wrong in (lambda: masks.causal() and masks.prefix(3), lambda: masks.causal() or masks.full(), lambda: not masks.full()):
        with pytest.raises(TypeError, match=r"combine masks with &, \|, ~ instead of and, or, not$"):
            wrong()


def test_global_tokens_print_as_they_are_written():
    for mask, text in (
        (masks.global_tokens(8), "global_tokens(8)"),
        (masks.global_tokens([3, 1]), "global_tokens([1, 3])"),
        (masks.global_tokens(range(20)), "global_tokens([0, 1, 2, 3, 4, 5, 6, 7, …])"),
        (masks.window(4, 0) | masks.global_tokens(2), "(window(4, 0) | global_tokens(2))"),
        (masks.prefix(3) | masks.prefix(2), "(prefix(3) | prefix(2))"),
    ):
        assert repr(mask) == text


def test_only_masks_combine():
    with pytest.raises(TypeError):
        masks.causal() & True
    with pytest.raises(TypeError):
        masks.causal() | np.ones((3, 3), bool)
