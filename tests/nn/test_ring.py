"""Attention in a ring: equal to that of one device, with as little memory, talk and idleness as it is for."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from pallas_kernels.attention import block_mask, masks, sparse_attention
from research.core.collectives import collectives, totals
from research.nn import ring_plan
from research.nn.ring import ring_attention
from research.nn.ring_plan import contiguous, plan, planned
from tests.pallas_kernels.attention.cases import made
from tests.pallas_kernels.attention.strategies import BY_HEAD, SPECS

FORWARD, GRADIENTS = 2e-5, 1e-4
LENGTH, HEADS = 64, 4
IDS = np.sort(np.random.default_rng(1).integers(0, 6, (2, LENGTH)), axis=-1)
MIXED = np.random.default_rng(2).integers(0, 3, (2, LENGTH)).astype(np.int32)
MASKS = {
    "causal": masks.causal(),
    "full": masks.full(),
    "window": masks.window(9, 0),
    "window to both sides": masks.window(3, 12),
    "prefix": masks.causal() | masks.prefix(19),
    "document": masks.causal() & masks.document(IDS[0]),
    "documents by sequence": masks.causal() & masks.document(IDS),
    "global tokens": masks.window(5, 5) | masks.global_tokens(3),
    "global tokens here and there": masks.causal() & (masks.window(5, 0) | masks.global_tokens([3, 40])),
    "strided": masks.causal() & (masks.window(3, 0) | masks.strided(7)),
    "dilated": masks.dilated(4, 3, 5),
    "by head": masks.per_head(masks.causal(), masks.window(4, 4), ~masks.causal(), masks.prefix(5)),
    "function": masks.from_function(lambda b, h, q, kv: (q * 3 + kv + b + h) % 5 < 2),
    "some see nothing": masks.window(9, 0) & ~masks.prefix(30),
    "nothing": ~masks.full(),
}
OPTIONS = {
    "plain": {},
    "one key head": {"kv_heads": 1},
    "sinks": {"sinks": True, "scale": 0.7},
    "softcap": {"softcap": 1.5, "kv_heads": 4},
    "segments": {"segments": MIXED},
    "all": {"segments": IDS.astype(np.int32), "sinks": True, "softcap": 2.0, "kv_heads": 1},
}


def operands(length=LENGTH, kv_heads=2, sinks=False, segments=None, dtype=np.float32):
    generator = np.random.default_rng(0)
    shapes = {"q": (2, length, HEADS, 8), "k": (2, length, kv_heads, 8), "v": (2, length, kv_heads, 6)}
    of = {name: jnp.asarray(generator.standard_normal(shape), dtype) for name, shape in shapes.items()}
    return of | ({"sinks": jnp.asarray(generator.standard_normal(HEADS), dtype)} if sinks else {}), segments


def mesh_of(n):
    return jax.make_mesh((n,), ("ring",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])


def in_a_ring(mask, n, check_vma=True, **options):
    """A function of (of, segments), whole sequences."""

    def local(of, segments):
        return ring_attention(
            of["q"], of["k"], of["v"], mask, axis="ring", segment_ids=segments, sinks=of.get("sinks"), **options
        )

    def call(of, segments=None):
        cut = jax.P(None, "ring")
        specs = {name: jax.P() if name == "sinks" else cut for name in of}
        return jax.shard_map(local, mesh=mesh_of(n), in_specs=(specs, cut), out_specs=cut, check_vma=check_vma)(of, segments)

    return call


def on_one_device(mask, **options):
    def call(of, segments=None):
        return sparse_attention(of["q"], of["k"], of["v"], mask, segment_ids=segments, sinks=of.get("sinks"), **options)

    return call


def results(call, of, segments):
    """(outputs, gradients of all operands)."""

    def loss(of):
        out = call(of, segments)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    (_, out), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(of)
    return jax.device_get((out, slopes))


@functools.cache
def expected(mask, options):
    of, segments, options = given_as(options)
    return results(on_one_device(MASKS[mask], **options), of, segments)


def given_as(name):
    options = dict(OPTIONS[name])
    of, segments = operands(**{key: options.pop(key) for key in ("kv_heads", "sinks", "segments") if key in options})
    return of, segments, options


def near(got, wanted, forward=FORWARD, gradients=GRADIENTS):
    for a, b, most in zip(got, wanted, (forward, gradients)):
        jax.tree.map(lambda a, b, most=most: np.testing.assert_allclose(a, b, atol=most, rtol=most), a, b)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def check(mask, options, n):
    of, segments, rest = given_as(options)
    near(results(in_a_ring(MASKS[mask], n, **rest), of, segments), expected(mask, options))


@pytest.mark.parametrize(
    "mask, options, n",
    [("causal", "all", 4), slow("window to both sides", "plain", 8), ("global tokens", "one key head", 2),
     slow("full", "segments", 2), ("documents by sequence", "plain", 2), ("some see nothing", "plain", 4),
     ("nothing", "plain", 4),
     *(slow("causal", options, 4) for options in OPTIONS if options not in ("plain", "all")),
     slow("global tokens here and there", "plain", 4), slow("function", "plain", 2), slow("strided", "plain", 2),
     slow("documents by sequence", "all", 4),
     *(slow(mask, "all", (2, 4)[i % 2]) for i, mask in enumerate(MASKS) if mask not in ("causal", "documents by sequence"))],
)  # fmt: skip
def test_values_and_gradients_are_those_of_one_device(mask, options, n):
    check(mask, options, n)


@pytest.mark.parametrize("implementation", ["reference", slow("xla")])
def test_places_that_are_data_give_the_same(implementation, monkeypatch):
    """As where a mask has many kinds of pieces: a program for every piece of keys, the place of the queries an argument."""
    mask = (masks.causal() | masks.prefix(19)) & masks.document(MIXED)
    monkeypatch.setattr(ring_plan, "MOST_CASES", 1)
    ring_plan.plan.cache_clear()
    ring = plan(mask, LENGTH, 2)
    assert ring.zigzag and len(ring.cases) == 4 and not any(case.placed for case in ring.cases)
    of, segments, rest = given_as("all")
    got = results(in_a_ring(mask, 2, implementation=implementation, **rest), of, segments)
    near(got, results(on_one_device(mask, implementation="reference", **rest), of, segments))
    ring_plan.plan.cache_clear()


@pytest.mark.slow
@settings(max_examples=5)
@given(SPECS | BY_HEAD, st.sampled_from([2, 4, 8]), st.sampled_from(["plain", "all"]))
def test_drawn_masks_give_what_they_give_on_one_device(spec, n, options):
    of, segments, rest = given_as(options)
    rest["implementation"] = "reference"  # quicker to compile
    got, wanted = (results(call(made(spec)), of, segments) for call in (
        functools.partial(in_a_ring, n=n, **rest), functools.partial(on_one_device, **rest)
    ))  # fmt: skip
    near(got, wanted)


@pytest.mark.parametrize("implementation", ["reference", slow("xla")])
def test_what_varies_over_which_axis_need_not_be_checked(implementation):
    of, _ = operands(sinks=True)
    got = results(in_a_ring(masks.causal(), 2, check_vma=False, implementation=implementation), of, None)
    near(got, results(on_one_device(masks.causal()), of, None))


def test_bfloat16_is_near_and_sums_in_float32():
    low, _ = operands(dtype=jnp.bfloat16)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), low)
    out, slopes = results(in_a_ring(masks.causal(), 4, implementation="reference"), low, None)
    assert out.dtype == slopes["k"].dtype == jnp.bfloat16
    wanted = results(on_one_device(masks.causal(), implementation="reference"), exact, None)
    near(jax.tree.map(lambda x: x.astype(np.float32), (out, slopes)), wanted, 0.02, 0.05)


def test_keys_that_are_not_seen_have_no_influence():
    """NaN in the last piece's keys reaches the queries of that piece alone, and gradients of no key before it."""
    of, _ = operands()
    spoilt = {**of, "k": of["k"].at[:, 60].set(jnp.nan)}
    call = in_a_ring(masks.causal(), 4, implementation="reference")
    clean = on_one_device(masks.causal(), implementation="reference")
    assert np.isnan(jax.jit(call)(spoilt)[:, 60:]).all()
    got, wanted = (results(lambda of, _, call=call: call(of)[:, :60], of, None) for call, of in ((call, spoilt), (clean, of)))
    near(got[0], wanted[0])
    for name, end in (("q", 60), ("k", 56), ("v", 56)):
        np.testing.assert_allclose(got[1][name][:, :end], wanted[1][name][:, :end], atol=GRADIENTS)


def test_what_does_not_fit_is_one_line():
    of, _ = operands()
    for call, line in [
        (in_a_ring(masks.document(IDS[0, :50]), 4), "mask: got one of 50 positions, wanted 64"),
        (in_a_ring(block_mask(masks.causal(), 64, 64), 4), "mask: got BlockMask, wanted a mask"),
        (in_a_ring(masks.per_head(masks.causal()), 4), "mask: got one of 1 heads, wanted 4"),
    ]:
        with pytest.raises(ValueError, match=line):
            jax.eval_shape(call, of)
    with pytest.raises(ValueError, match="got 16 queries, 8 keys and 16 values"):
        jax.eval_shape(in_a_ring(masks.causal(), 4), {**of, "k": of["k"][:, :32]})


# What is planned, before anything compiles


def come_by(ring):
    """{(chunk of queries, chunk of keys): entries of the table}, as devices come by them."""
    found = collections.defaultdict(list)
    n = len(ring.chunks)
    for step, devices in enumerate(ring.visits()):
        for i, looked_up in enumerate(devices):
            theirs = ring.chunks[(i - ring.first - step) % n]
            for place, index in np.ndenumerate(looked_up):
                found[int(ring.chunks[i, place[0]]), int(theirs[place[1]])].append(int(index))
    return found


@given(SPECS | BY_HEAD, st.sampled_from([2, 3, 4, 8]))
def test_every_pair_that_is_seen_is_come_by_once(spec, n):
    mask, length = made(spec), 96
    ring = plan(mask, length, n)
    size = length // ring.chunks.size
    assert sorted(ring.chunks.ravel()) == list(range(ring.chunks.size))

    def pairs(mask, q_first, kv_first):
        index = np.ix_(np.arange(2), np.arange(HEADS), q_first + np.arange(size), kv_first + np.arange(size))
        return np.broadcast_to(mask(*index), (2, HEADS, size, size))

    found = come_by(ring)
    assert all(len(times) == 1 for times in found.values())
    for (a, b), entry in np.ndenumerate(ring.table):
        wanted = pairs(mask, a * size, b * size)
        if not entry:
            assert not wanted.any()
            continue
        assert found[a, b] == [entry]
        case = ring.cases[entry - 1]
        np.testing.assert_array_equal(pairs(case.mask, 0 if case.placed else (a - b) * size, 0), wanted)


def blocks(mask, length, ring):
    """int [steps, devices]: blocks of 8 x 8 pairs that are not empty."""
    size = length // ring.chunks.size
    each = [0]
    for case in ring.cases:
        assert case.placed
        counts = block_mask(case.mask, size, size, 8, 8, heads=1, batch=1).counts()
        each.append(counts["full"] + counts["partial"])
    return np.array(each)[ring.visits()].sum((2, 3))


def test_causal_work_is_the_same_for_all_devices_at_every_step():
    mask, length = masks.causal(), 1024
    ring = plan(mask, length, 8)
    assert ring.zigzag and len(ring.cases) == 2
    work = blocks(mask, length, ring)
    assert (work == work[:, :1]).all()
    plain = blocks(mask, length, planned(mask, length, contiguous(8)))
    assert plain.sum() == work.sum()  # nothing is computed twice or left out
    assert plain.sum(0).max() > 7 * plain.sum(0).min()
    assert work.max(1).sum() < 0.6 * plain.max(1).sum()  # the time of all steps, which wait for the slowest


@pytest.mark.parametrize("mask", ["prefix", "strided"])
def test_causal_like_work_is_about_the_same_for_all_devices(mask):
    work = blocks(MASKS[mask], 1024, plan(MASKS[mask], 1024, 4)).sum(0)
    assert work.max() < 1.2 * work.min()


def test_a_ring_is_no_longer_than_the_mask_reaches():
    def reach(mask):
        ring = plan(mask, 1024, 8)
        return ring.zigzag, ring.first, ring.steps

    assert reach(masks.window(127, 0)) == (False, 0, 2)
    assert reach(masks.window(129, 0)) == (False, 0, 3)
    assert reach(masks.window(5, 5)) == (False, 7, 3)
    assert reach(masks.document(np.arange(1024) // 128)) == (False, 0, 1)
    assert reach(masks.full()) == (False, 0, 8)
    assert reach(~masks.full())[2] == 0
    ring = plan(masks.window(127, 0), 1024, 8)
    assert (ring.visits() > 0).sum() == 15  # own keys, and those of the device before


def test_far_pieces_need_no_more_programs():
    for mask, most in [(masks.causal(), 2), (masks.window(300, 0) | masks.global_tokens(4), 8), (MASKS["strided"], 16)]:
        assert len(plan(mask, 1 << 20, 64).cases) <= most


# What is compiled


@functools.cache
def compiled(mask, n, length):
    """Forward and backward pass, not run."""
    shape = {name: jax.ShapeDtypeStruct((1, length, heads, 16), jnp.float32) for name, heads in zip("qkv", (2, 1, 1))}

    def loss(of):
        return jnp.sum(in_a_ring(mask, n)(of) ** 2)

    shardings = dict.fromkeys("qkv", jax.NamedSharding(mesh_of(n), jax.P(None, "ring")))
    return jax.jit(jax.grad(loss), in_shardings=(shardings,), out_shardings=shardings).lower(shape).compile()


def test_a_ring_passes_keys_on_and_gathers_nothing():
    n = 4
    found = totals(collectives(compiled(masks.full(), n, 4096).as_text()))
    # forward k, v at every step; backward k, v, dk, dv, and dk, dv once more to where they belong
    assert found["collective-permute"].runs == 2 * n + 4 * n + 2
    assert found.get("all-gather", (0,))[0] == found.get("all-to-all", (0,))[0] == 0
    zigzag = totals(collectives(compiled(masks.causal(), n, 4096).as_text()))
    # besides, halves of q, k, v and out on their way to zigzag and back, and those of their gradients
    assert zigzag["collective-permute"].runs == found["collective-permute"].runs + 2 * 2 * 4
    assert zigzag.get("all-gather", (0,))[0] == 0


@pytest.mark.parametrize("mask", ["causal", "full"])
@pytest.mark.parametrize("n", [2, 8])
def test_the_backward_pass_keeps_own_queries_keys_and_results_alone(mask, n):
    """Of all devices together that is q, k, v, out and the log-sum-exp of the whole sequence, however many there are."""
    of, _ = operands()
    kept = jax.eval_shape(lambda of: jax.vjp(in_a_ring(MASKS[mask], n), of)[1], of)
    floats = [x for x in jax.tree.leaves(kept) if jnp.issubdtype(x.dtype, jnp.floating) and x.size > n]
    needed = sum(x.size for x in of.values()) + 2 * LENGTH * HEADS * (6 + 1)
    assert sum(x.size for x in floats) == needed


@pytest.mark.slow
def test_memory_of_a_device_falls_with_the_number_of_devices():
    """Temporary memory of the forward and backward pass of 8,192 positions, as the compiler plans it for one device."""
    sizes = [compiled(masks.causal(), n, 8192).memory_analysis().temp_size_in_bytes for n in (2, 4, 8)]
    assert sizes[1] < 0.6 * sizes[0] and sizes[2] < 0.6 * sizes[1], sizes
