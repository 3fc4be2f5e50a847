"""The public function: what it takes, what it gives, and one line for what does not fit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from pallas_kernels.attention import SelectedBlocks, api, block_mask, masks, reference, sparse_attention
from tests.pallas_kernels.attention import oracle
from tests.pallas_kernels.kernel_base import FORWARD, same

CAUSAL = masks.causal()


def operands(b=2, t=6, s=6, h=4, k=2, d=8, d_v=8, dtype=np.float32):
    generator = np.random.default_rng(0)
    shapes = (b, t, h, d), (b, s, k, d), (b, s, k, d_v)
    return [generator.standard_normal(shape).astype(dtype) for shape in shapes]


Q, K, V = operands()
PICKS = np.zeros((1, 1, 2, 1), np.int32)


def call(q=Q, k=K, v=V, mask=CAUSAL, **arguments):
    return sparse_attention(q, k, v, mask, implementation="reference", **arguments)


REFUSED = {
    "q is no array": ({"q": Q.tolist()}, r"^q: got list, wanted an array$"),
    "k of whole numbers": ({"k": K.astype(int)}, r"^k: got dtype int32, wanted one of float32, bfloat16, float16, float64$"),
    "q of three axes": ({"q": Q[0]}, r"^q: got shape \[6, 4, 8\], wanted \[batch, length, heads, head_dim\]$"),
    "an empty axis": ({"v": V[:, :, :, :0]}, r"^v: got shape \[2, 6, 2, 0\], wanted no empty axis$"),
    "two dtypes": ({"v": V.astype(np.float16)}, r"^v: got dtype float16, wanted float32 as q has$"),
    "two batches": ({"k": K[:1], "v": V[:1]}, r"^k: got shape \[1, 6, 2, 8\], wanted \[2, 6, 2, 8\] \[batch, kv_len,.* q$"),
    "two head dimensions": ({"k": K[..., :5]}, r"^k: got shape \[2, 6, 2, 5\], wanted \[2, 6, 2, 8\]"),
    "other values than keys": ({"v": V[:, :4]}, r"^v: got shape \[2, 4, 2, 8\], wanted \[2, 6, 2, 8\] .* beside k$"),
    "heads that do not divide": ({"q": Q[:, :, :3]}, r"^k: got 2 heads, wanted a divisor of q's 3$"),
    "no mask": ({"mask": None}, r"^mask: got NoneType, wanted a mask such as masks.causal\(\), a BlockMask or SelectedBlocks$"),
    "a matrix": ({"mask": np.ones((6, 6), bool)}, r"^mask: got ndarray, wanted a mask such as"),
    "other pairs": ({"mask": block_mask(CAUSAL, 6, 7)}, r"^mask: got a BlockMask of 6 x 7 pairs, wanted 6 x 6$"),
    "another offset": (
        {"mask": block_mask(CAUSAL, 6, 6, q_offset=2), "q_offset": 1},
        r"^q_offset: got 1, wanted 2, which the BlockMask was made with$",
    ),
    "another offset, NumPy's": (
        {"mask": block_mask(CAUSAL, 6, 6, q_offset=2), "q_offset": np.int64(1)},
        r"^q_offset: got 1, wanted 2, which the BlockMask was made with$",
    ),
    "a mask of other heads": ({"mask": masks.per_head(*[CAUSAL] * 3)}, r"^mask: got one of 3 heads, wanted 4 as q has$"),
    "a mask of other sequences": (
        {"mask": masks.document(np.zeros((3, 6), int))},
        r"^mask: got one of 3 sequences, wanted 2 as q has$",
    ),
    "a mask of fewer keys": ({"mask": masks.document(np.zeros(5, int))}, r"^mask: got one of 5 positions, wanted 6, those of"),
    "a mask of fewer keys, at an offset that is data": (
        {"mask": ~masks.document(np.zeros(5, int)), "q_offset": jnp.int32(0)},
        r"^mask: got one of 5 positions, wanted 6, those of",
    ),
    "a mask of fewer queries": (
        {"mask": CAUSAL & masks.document(np.zeros(8, int)), "q_offset": 3},
        r"^mask: got one of 8 positions, wanted 9, those of",
    ),
    "blocks selected from fewer keys": (
        {"mask": SelectedBlocks(PICKS, 4, 4, masks.random_blocks(0, 1, 1, 5))},
        r"^mask: got one of 5 positions, wanted 6, those of",
    ),
    "a block mask of other heads": (
        {"mask": block_mask(masks.from_function(lambda b, h, q, kv: kv <= q + h), 6, 6, heads=3)},
        r"^mask: got a BlockMask for 3 heads, wanted 4 as q has$",
    ),
    "a block mask of other sequences": (
        {"mask": block_mask(masks.from_function(lambda b, h, q, kv: kv <= q + b), 6, 6, batch=3)},
        r"^mask: got a BlockMask for 3 sequences, wanted 2 as q has$",
    ),
    "selected for other heads": (
        {"mask": SelectedBlocks(np.zeros((1, 3, 2, 1), np.int32), 4, 4, CAUSAL)},
        r"^mask.index: got int32\[1, 3, 2, 1\], wanted integers \[1 or 2, heads: 1, 2, 4, 2, count\]$",
    ),
    "selected for other rows": ({"mask": SelectedBlocks(PICKS, 2, 4, CAUSAL)}, r"^mask.index: got int32\[1, 1, 2, 1\], wanted"),
    "selected by fractions": ({"mask": SelectedBlocks(PICKS * 1.0, 4, 4, CAUSAL)}, r"^mask.index: got float32\[1, 1, 2, 1\]"),
    "a fraction as offset": ({"q_offset": 1.5}, r"^q_offset: got float32\[\], wanted a whole number, or .* \[\] or \[2\]$"),
    "offsets of other sequences": ({"q_offset": np.zeros(3, int)}, r"^q_offset: got int32\[3\], wanted"),
    "no mask in selected": ({"mask": SelectedBlocks(PICKS, 4, 4, None)}, r"^mask.mask: got NoneType, wanted a mask such as"),
    "selected blocks of no length": ({"mask": SelectedBlocks(PICKS, 0, 4, CAUSAL)}, r"^mask.q_block: got 0, wanted a whole"),
    "a list of selected": ({"mask": SelectedBlocks(PICKS.tolist(), 4, 4, CAUSAL)}, r"^mask.index: got list, wanted an array"),
    "a list as offset": ({"q_offset": [1]}, r"^q_offset: got list, wanted a whole number"),
    "an offset of many bits": ({"q_offset": 2**31}, r"^q_offset: got 2147483648, wanted a whole number from -1073741824 to "),
    "an offset at the end of int32": ({"q_offset": 2**31 - 3}, r"^q_offset: got 2147483645, wanted a whole number from"),
    "an offset of many bits in an array": ({"q_offset": np.array([0, 2**32])}, r"^q_offset: got 4294967296, wanted"),
    "an offset before documents": (
        {"mask": CAUSAL & masks.document(np.zeros(8, int)), "q_offset": -3},
        r"^q_offset: got -3, wanted at least 0 for a mask of 8 positions, which begin at 0$",
    ),
    "an offset before random blocks": ({"mask": masks.random_blocks(0, 4, 1, 8), "q_offset": np.int64(-1)}, r"^q_offset: got"),
    "a score_mod that is none": ({"score_mod": 3}, r"^score_mod: got 3, wanted a function"),
    "a score_mod of rows": (
        {"score_mod": lambda s, b, h, q, kv: jnp.stack([s, s])},
        r"^score_mod: got float32\[2\] for a single score, wanted float32\[\]$",
    ),
    "a score_mod of whole numbers": (
        {"score_mod": lambda s, b, h, q, kv: q - kv},
        r"^score_mod: got int32\[\] for a single score, wanted float32\[\]$",
    ),
    "a score_mod with if": (
        {"score_mod": lambda s, b, h, q, kv: s if q > kv else 2 * s},
        r"^score_mod needs the value of what it is called with, which are arrays: wanted .* instead of and, or, not and if",
    ),
    "a score_mod with a table of NumPy's": (
        {"score_mod": lambda s, b, h, q, kv: s * np.ones(6, np.float32)[q]},
        r"^score_mod needs the value of .* tables as jnp.asarray\(table\)\[index\]$",
    ),
    "a score_mod of three": (
        {"score_mod": lambda s, q, kv: s},
        r"^score_mod is called with \(score, batch, head, q_index, kv_index\): too many positional arguments$",
    ),
    "a score_mod of a tuple": ({"score_mod": lambda s, b, h, q, kv: (s,)}, r"^score_mod: got tuple of float32\[\] for"),
    "a score_mod of nothing": ({"score_mod": lambda s, b, h, q, kv: None}, r"^score_mod: got nothing for a single score"),
    "segments as lists": ({"segment_ids": [[0] * 6] * 2}, r"^segment_ids: got list, wanted an array"),
    "segments of many bits": ({"segment_ids": np.full((2, 6), 2**32)}, r"^segment_ids: got ids from 4294967296 to .* holds$"),
    "segments of other keys": ({"segment_ids": np.zeros((2, 5), int)}, r"^segment_ids: got shape \[2, 5\], wanted \[2, 6\]"),
    "three segments": ({"segment_ids": (np.zeros((2, 6), int),) * 3}, r"^segment_ids: got 3 arrays, wanted one or a pair"),
    "segments of fractions": ({"segment_ids": np.zeros((2, 6))}, r"^segment_ids: got dtype float32, wanted integers$"),
    "sinks of other heads": ({"sinks": np.zeros(2, np.float32)}, r"^sinks: got shape \[2\], wanted \[4\] \[q_heads\]$"),
    "whole sinks": ({"sinks": np.zeros(4, int)}, r"^sinks: got dtype int32, wanted one of"),
    "a softcap of nothing": ({"softcap": 0}, r"^softcap: got 0, wanted a positive number of Python or NumPy"),
    "a softcap that is traced": ({"softcap": jnp.float32(2)}, r"^softcap: got .*, wanted a positive number of Python or NumPy"),
    "a softcap that is a switch": ({"softcap": True}, r"^softcap: got True, wanted a positive number of Python or NumPy"),
    "a scale that is a switch": ({"scale": False}, r"^scale: got False, wanted a finite number of Python or NumPy"),
    "a scale of many digits": ({"scale": 10**400}, r"^scale: got 1000000.*…, wanted a finite number"),
    "a scale of thousands of digits": ({"scale": 10**9000}, r"^scale: got int, wanted a finite number"),
    "a scale beyond float32": ({"scale": 1e39}, r"^scale: got 1e\+39, wanted a finite number"),
    "no scale": ({"scale": float("nan")}, r"^scale: got nan, wanted a finite number"),
    "an endless scale": ({"scale": float("inf")}, r"^scale: got inf, wanted a finite number of Python or NumPy"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_one_line(name):
    """That names the argument, what was got and what is wanted; before anything is computed, also under jit."""
    arguments, says = REFUSED[name]
    with pytest.raises(ValueError, match=says) as error:
        call(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given, nearest", [("reference_", "reference"), ("XLA", "xla"), (["tpu"], "tpu")])
def test_an_unknown_implementation_is_told_the_nearest(given, nearest):
    with pytest.raises(ValueError, match=rf"implementation=.*; allowed: None, .*; nearest: '{nearest}'$"):
        sparse_attention(Q, K, V, CAUSAL, implementation=given)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, np.int64, int, float])
def test_softcap_and_scale_are_numbers_of_python_or_numpy(kind):
    got = call(softcap=kind(2), scale=kind(3))
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, call(softcap=2.0, scale=3.0))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_windows_and_offsets_at_the_ends_of_int32_do_not_wrap(implementation):
    """What is further than any position sees all. An offset that is data stops before sums with it would wrap."""

    def attend(mask, q_offset=0):
        return sparse_attention(Q, K, V, mask, q_offset=q_offset, implementation=implementation)

    far, offset = 2**31 - 1, jnp.int32(2**31 - 1)
    pairs = [
        (attend(masks.window(0, far)), attend(masks.window(0, None))),
        (attend(masks.window(far, 0)), attend(CAUSAL)),
        (attend(masks.window(far, far), -4), attend(masks.full())),
        (attend(masks.block_window(4, 0, far)), attend(masks.block_window(4, 0, 5))),
        (attend(masks.window(0, far - 2), jnp.int32(3)), attend(masks.window(0, None), 3)),
        (attend(CAUSAL, offset), attend(masks.full())),
        (attend(masks.window(far, 0), offset), attend(masks.full())),
        (attend(CAUSAL, -offset), attend(~masks.full())),
        (attend(~masks.window(None, 1), -offset), attend(masks.full())),
    ]
    for got, wanted in pairs:
        same(got, wanted, FORWARD)


@pytest.mark.parametrize("dtype", [np.int64, np.uint32, np.int32, np.int8])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_selected_number_that_no_block_has_selects_nothing(dtype, implementation):
    """Be it negative, too great, or of more bits than int32 has; so rows are filled up."""
    others = {"int64": [2**32, -(2**40), -7], "uint32": [2**32 - 1, 2**31, 100], "int32": [100, -7, -1], "int8": [100, -7, -1]}
    index = np.array([[1, *others[np.dtype(dtype).name]], [0, *others[np.dtype(dtype).name]]], dtype)[None, None]
    assert index.dtype == dtype
    got = sparse_attention(Q, K, V, SelectedBlocks(index, 4, 4, masks.full()), implementation=implementation)
    plain = SelectedBlocks(np.array([[[[1], [0]]]], np.int32), 4, 4, masks.full())
    same(got, sparse_attention(Q, K, V, plain, implementation="reference"), FORWARD)
    nothing = SelectedBlocks(np.full((1, 1, 2, 1), -7), 4, 4, masks.full())
    assert not sparse_attention(Q, K, V, nothing, implementation=implementation).any()


def test_selected_blocks_are_equal_to_themselves_alone_and_print_in_a_line():
    """Also where they are traced."""
    one, other = (SelectedBlocks(jnp.asarray(PICKS), 4, 8, CAUSAL) for _ in range(2))
    assert one == one and one != other and len({one, other, one}) == 2
    assert repr(one) == "SelectedBlocks(int32[1, 1, 2, 1], 4 x 8, causal())"
    assert jax.jit(lambda picks: picks == picks and len(repr(picks)))(one) == len(repr(one))


def test_none_falls_back_where_the_best_does_not_support_the_call(monkeypatch):
    """And a name does not: its NotImplementedError, which names the argument, arrives."""

    def refuses(q, k, v, mask, *, softcap, **others):
        if softcap is not None:
            raise NotImplementedError("softcap: not here")
        return reference.attend(q * 0, k, v, mask, softcap=softcap, **others)

    monkeypatch.setattr(api, "IMPLEMENTATIONS", {"xla": refuses, "reference": reference.attend})
    expected = call(softcap=2.0)
    np.testing.assert_array_equal(sparse_attention(Q, K, V, CAUSAL, softcap=2.0), expected)
    assert np.abs(sparse_attention(Q, K, V, CAUSAL) - call()).max() > 0.1  # the best was taken
    with pytest.raises(NotImplementedError, match="^softcap: not here$"):
        sparse_attention(Q, K, V, CAUSAL, softcap=2.0, implementation="xla")


def test_explicit_mesh_axes_are_refused_and_auto_ones_taken():
    q, k, v = operands(b=8)
    expected = call(q, k, v)
    for kind in (AxisType.Explicit, AxisType.Auto):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            sharded = [jax.device_put(x, NamedSharding(mesh, jax.P("data"))) for x in (q, k, v)]
            if kind == AxisType.Auto:
                same(call(*sharded), expected, FORWARD)
                continue
            for run in (call, jax.jit(call)):
                with pytest.raises(ValueError, match=r"^q: got float32\[8@data,6,4,8\], wanted mesh axes that are Auto"):
                    run(*sharded)
            auto = jax.sharding.auto_axes(call, out_sharding=jax.P("data"))
            same(auto(*sharded), expected, FORWARD)


@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
def test_a_kernel_named_where_it_does_not_run_is_refused(implementation):
    """Also under jit and grad, before anything is lowered."""

    def loss(q):
        return sparse_attention(q, K, V, CAUSAL, implementation=implementation).sum()

    for run in (loss, jax.jit(loss), jax.grad(loss)):
        with pytest.raises(NotImplementedError, match=rf"^implementation: '{implementation}' does not run on cpu \(cpu\)"):
            run(Q)


def exact(q, k, v, spec, offset=(0,), **arguments):
    seen = oracle.table(spec, q.shape[0], q.shape[2], q.shape[1], k.shape[1], offset)
    wide = {name: np.asarray(x, np.float64) for name, x in zip("qkv", (q, k, v))}
    shape = (*q.shape[:3], v.shape[3])
    return oracle.attention(seen, wide, (np.zeros(shape), np.zeros(shape[:3])), offset=offset, **arguments).values


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_results_have_the_dtype_of_the_queries_and_sums_are_float32(dtype):
    q, k, v = (jnp.asarray(x).astype(dtype) for x in operands())
    out, lse = call(q, k, v, return_lse=True)
    assert out.dtype == dtype and out.shape == (2, 6, 4, 8)
    assert lse.dtype == jnp.float32 and lse.shape == (2, 6, 4)
    same(lse, exact(q, k, v, ["causal"])[1], FORWARD)
    assert isinstance(call(q, k, v), jax.Array)


def test_float64_is_computed_in_float64():
    with jax.enable_x64(True):
        q, k, v = operands(dtype=np.float64)
        out, lse = call(q, k, v, return_lse=True)
        assert out.dtype == lse.dtype == jnp.float64
        same((out, lse), exact(q, k, v, ["causal"]), 1e-13)


def test_numpy_arrays_are_taken_and_wide_ones_narrowed_as_jax_does():
    """Operands, segments, offsets, sinks, selections."""
    q, k, v = operands(dtype=np.float64)
    segments = np.array([[0, 0, 0, 1, 1, 1]] * 2)
    arguments = {"segment_ids": segments, "sinks": np.zeros(4), "q_offset": np.int64(0)}
    got = call(q, k, v, SelectedBlocks(PICKS, 4, 4, CAUSAL), **arguments)
    arguments = {"segment_ids": (jnp.asarray(segments),) * 2, "sinks": jnp.zeros(4), "q_offset": 0}
    expected = call(*map(jnp.asarray, (q, k, v)), SelectedBlocks(jnp.asarray(PICKS), 4, 4, CAUSAL), **arguments)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, expected)


def test_offsets_may_be_whole_numbers_of_any_kind():
    """Of Python and NumPy, of JAX, by sequence; known or traced."""
    q = Q[:, :2]
    expected = exact(q, K, V, ["window", 2, 0], (3,))[0]
    for offset in (3, np.int64(3), np.uint8(3), np.array(3), jnp.int32(3), np.array([3, 3]), jnp.array([3, 3], jnp.int16)):
        same(call(q=q, mask=masks.window(2, 0), q_offset=offset), expected, FORWARD)
    apart = call(q=q, mask=masks.window(2, 0), q_offset=np.array([3, 0]))
    same(apart, exact(q, K, V, ["window", 2, 0], (3, 0))[0], FORWARD)


def test_the_scale_is_that_of_the_keys_dimension_unless_given():
    q, k, v = operands(d=8, d_v=5)
    same(call(q, k, v), exact(q, k, v, ["causal"], scale=8**-0.5)[0], FORWARD)
    for scale in (0.3, -0.3, 0, 2):
        same(call(q, k, v, scale=scale), exact(q, k, v, ["causal"], scale=scale)[0], FORWARD)


def test_score_mod_is_called_with_single_scores_and_whole_indices():
    """As FlexAttention calls it; queries are counted from q_offset."""
    seen = {}

    def mod(score, b, h, q, kv):
        seen.update(score=score, indices=(b, h, q, kv))
        return score + 0.1 * (q - 2 * kv) + h - 0.5 * b

    out, lse = call(score_mod=mod, q_offset=3, return_lse=True)
    assert all(jnp.issubdtype(x.dtype, jnp.integer) for x in seen["indices"])
    assert all(x.shape == () for x in (seen["score"], *seen["indices"]))
    by_b = [exact(Q[b : b + 1], K[b : b + 1], V[b : b + 1], ["causal"], (3,), mod=lambda score, h, q, kv, arrays, b=b: (
        score + 0.1 * (q - 2 * kv) + h - 0.5 * b, 1, {})) for b in range(2)]  # fmt: skip
    same((out, lse), tuple(np.concatenate(x) for x in zip(*by_b)), FORWARD)


def test_a_block_mask_is_its_mask():
    """Also one made for a known offset, or for any when the offset is data."""
    mask = masks.window(2, 1)
    np.testing.assert_array_equal(call(mask=block_mask(mask, 6, 6, 4, 4)), call(mask=mask))
    offset = block_mask(mask, 6, 6, 4, 4, q_offset=2)
    np.testing.assert_array_equal(call(mask=offset, q_offset=2), call(mask=mask, q_offset=2))
    np.testing.assert_array_equal(call(mask=offset, q_offset=jnp.int32(1)), call(mask=mask, q_offset=1))
