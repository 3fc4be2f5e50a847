"""The kernels for GPUs through Pallas-Triton, in its interpret mode: values, gradients, what is refused, which kernel is taken.

What only a compiler sees (registers, shared memory, whether an operation exists there) is the compile matrix's part.
"""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec

from pallas_kernels import dispatch
from pallas_kernels.attention import SelectedBlocks, api, block_mask, gpu, gpu_lists, gpu_triton, masks, reference
from pallas_kernels.attention.lists import EMPTY, FULL, PARTIAL, BlockLists, Segments
from tests.pallas_kernels.attention.cases import CASES, KERNEL, SEGMENTS, Case
from tests.pallas_kernels.kernel_base import identical, results, same_results

PLAIN = {"q_offset": 0, "score_mod": None, "segment_ids": None, "sinks": None, "softcap": None, "scale": 0.2}
NAMES = (  # quick ones; all that differ in more than masks are among test_implementations' slow tests
    "documents of one list, mixed", "fewer keys, nothing seen", "other values", "alibi", "a step of decoding",
    "selected, segments and sinks",
)  # fmt: skip


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setitem(api.IMPLEMENTATIONS, "gpu", functools.partial(gpu.attend, interpret=True))


def operands(q_len, kv_len, heads=2, kv_heads=1, d=16, batch=1):
    generator = np.random.default_rng(0)
    shapes = (batch, q_len, heads, d), (batch, kv_len, kv_heads, d), (batch, kv_len, kv_heads, d)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in zip("qkv", shapes)}


def equals_reference(case):
    arrays = KERNEL.arrays(case)
    same_results(*(results(KERNEL.call(case, implementation), arrays) for implementation in ("gpu", "reference")))


def compared(mask, of, **arguments):
    """Results of the kernels and of the reference."""

    def run(attend, **more):
        call = lambda of: attend(of["q"], of["k"], of["v"], mask, **PLAIN | arguments, **more)  # noqa: E731
        return results(call, of)

    return run(gpu.attend, interpret=True), run(reference.attend)


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_the_references(name):
    equals_reference(CASES[name])


def test_blocks_are_cut_into_tiles():
    """Of 64 queries and 96 keys: tiles have at most 64 x 32 (forward) here, and the largest power of two in 96 is 32."""
    softcap = Case(["window", 100, 30], q_len=150, kv_len=200, q_heads=2, d_qk=32, batch=1, softcap=2.0, blocks=(64, 96))
    equals_reference(softcap)
    documents = Case(["document", [i // 50 for i in range(200)]], q_len=150, kv_len=200, q_heads=2, batch=1, blocks=(64, 96))
    equals_reference(documents)


def test_selected_blocks_of_a_mask_of_arrays():
    """Their bitmaps are found among those of the mask, by place; what segments cut has the bitmap of all pairs."""
    index = jnp.array([[[[0, 2, -1], [1, 0, 0], [2, 3, 1], [3, -1, -1], [0, 1, 2]]]], jnp.int32)
    ids = jnp.array([[0] * 20 + [1] * 47], jnp.int32)
    mask = SelectedBlocks(index, 16, 32, masks.document(np.arange(100) // 24))
    same_results(*compared(mask, operands(67, 100), segment_ids=Segments(ids, jnp.repeat(ids, 2, axis=1)[:, 34:])))


def test_a_negative_scale():
    same_results(*compared(block_mask(masks.causal(), 40, 40, 16, 16), operands(40, 40), scale=-0.3))


def forward(mask, attend, **arguments):
    """The compiled forward pass."""
    return jax.jit(lambda of: attend(of["q"], of["k"], of["v"], mask, **PLAIN | arguments))


BAD = {("k", 3, 5): np.inf, ("k", 20, 0): -np.inf, ("v", 40, 2): -np.inf, ("v", 9, 1): np.nan, ("k", 50, 3): np.nan}


def test_keys_that_are_not_finite_change_only_what_sees_them():
    """Nothing looks for them in FULL blocks, whose queries all become NaN: of an infinite score, one of minus infinity, which
    would pass for a key that is not seen, an infinite value or one that is lost."""
    of = operands(64, 64)
    for (name, key, element), value in BAD.items():
        of[name][0, key, 0, element] = value
    mask = block_mask(masks.window(20, 0) & ~masks.prefix(4), 64, 64, 16, 16)
    mine, expected = forward(mask, gpu.attend, interpret=True)(of), forward(mask, reference.attend)(of)
    assert np.isfinite(expected[0]).any() and np.isnan(expected[0]).any()
    for got, wanted in zip(mine, expected):
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)
    run = forward(block_mask(masks.full(), 64, 64, 16, 16), gpu.attend, interpret=True, softcap=2.0)
    for (name, key, element), value in BAD.items():
        of = operands(64, 64)
        of[name][0, key, 0, element] = value
        assert all(np.isnan(x).all() for x in run(of)), (name, value)


def test_keys_that_are_not_finite_give_no_gradient_to_queries_that_do_not_see_them():
    """Nor do they take away from the gradients of keys that those queries see alone."""
    of = operands(64, 64)
    of["k"][0, 50:60], of["v"][0, 52:60] = np.nan, np.inf
    mask = block_mask(masks.window(5, 0), 64, 64, 16, 16)

    def gradients(attend, **more):
        def loss(of):
            out, lse = attend(of["q"], of["k"], of["v"], mask, **PLAIN, **more)
            return (out[:, :50] ** 2).sum() + lse[:, :50].sum()

        return jax.jit(jax.grad(loss))(of)

    got, wanted = gradients(gpu.attend, interpret=True), gradients(reference.attend)
    for name in "qkv":
        assert np.isfinite(got[name][:, :45]).all()
        np.testing.assert_allclose(got[name], wanted[name], atol=1e-4)


@pytest.mark.slow
def test_what_jax_does_to_functions():
    """vmap, checkpoint, a mesh over batch and heads; and the same bits every time."""
    of = operands(33, 33, batch=2, heads=2, kv_heads=2)
    mask = block_mask(masks.causal(), 33, 33, 16, 16)

    def loss(of):
        out, lse = gpu.attend(of["q"], of["k"], of["v"], mask, **PLAIN, interpret=True)
        return (out**2).sum() + lse.sum()

    expected = jax.jit(jax.grad(loss))(of)
    identical(jax.jit(jax.grad(loss))(of), expected)
    identical(jax.jit(jax.grad(jax.checkpoint(loss)))(of), expected)
    each = jax.tree.map(lambda x: jnp.asarray(x)[:, None], of)
    mapped = jax.jit(jax.vmap(jax.grad(loss)))(each)
    for name in of:
        np.testing.assert_allclose(mapped[name][:, 0], expected[name], atol=1e-5)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = PartitionSpec("data", None, "tensor")
    sharded = functools.partial(jax.shard_map, in_specs=(dict.fromkeys(of, spec),), out_specs=spec)
    # without check_vma, which JAX's interpreter needs; the kernels do not:
    parts = jax.jit(sharded(jax.grad(loss), mesh=mesh, check_vma=False))(of)
    compiled = functools.partial(gpu.attend, mask=mask, **PLAIN)
    gpus = mesh.abstract_mesh.update(abstract_device=device("NVIDIA A100"))
    assert jax.eval_shape(sharded(lambda of: compiled(*(of[name] for name in "qkv"))[0], mesh=gpus), of).shape == of["q"].shape
    for name in of:
        np.testing.assert_allclose(parts[name], expected[name], atol=1e-5)


def test_visits_are_the_lists_row_by_row():
    row, column = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 2, 2, 0, 1, 2])
    kind = np.array([PARTIAL, FULL, EMPTY, FULL, PARTIAL, FULL])
    lists = BlockLists(*(x[None, None].astype(np.int32) for x in (row, column, kind)))
    found = gpu_lists.visits(lists, None, "row", 3)
    assert isinstance(found.ends, np.ndarray)
    assert found.ends[0, 0].tolist() == [0, 1, 2, 2, 2, 4, 5]
    assert found.other[0, 0, :5].tolist() == [2, 0, 0, 2, 1]
    turned = gpu_lists.visits(BlockLists(*map(jnp.asarray, lists)), None, "column", 3)
    assert turned.ends[0, 0].tolist() == [0, 1, 2, 2, 3, 5, 5]
    assert turned.other[0, 0, :5].tolist() == [2, 0, 2, 0, 2]


TABLE = np.array([1.0, 2.0], np.float32)
REFUSED = {
    "q: float64": ({"dtype": np.float64}, masks.causal(), {}),
    "q: float32": ({"d": 160}, masks.causal(), {}),
    "score_mod": ({}, masks.causal(), {"score_mod": lambda s, b, h, q, kv: s * jnp.asarray(TABLE)[h]}),
    "q_offset": ({}, masks.document(np.arange(32) // 5), {"q_offset": jnp.int32(3)}),
    "mask: blocks": ({}, block_mask(masks.causal(), 32, 32, 24, 16), {}),
}


@pytest.mark.parametrize("start", REFUSED)
def test_what_is_not_supported_is_refused_by_name(start):
    sizes, mask, arguments = REFUSED[start]
    dtype = sizes.pop("dtype", np.float32)
    with jax.enable_x64(dtype == np.float64):
        of = {name: jnp.asarray(x, dtype) for name, x in operands(32, 32, **sizes).items()}
        with pytest.raises(NotImplementedError, match=f"^{start}"):
            gpu.attend(of["q"], of["k"], of["v"], mask, **PLAIN | arguments, interpret=True)


def device(kind: str) -> AbstractDevice:
    return AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")


def meant_for(kind: str):
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device(kind)))


@pytest.mark.parametrize(
    "kind, hopper", [("NVIDIA H100 80GB HBM3", True), ("NVIDIA GH200 480GB", True), ("NVIDIA A100-SXM4-80GB", False),
                     ("NVIDIA B200", False), ("H100", True), ("NVIDIA RTX A1000", False)],
)  # fmt: skip
def test_hopper_is_known_by_its_name(kind, hopper):
    with meant_for(kind):
        assert gpu.on_hopper() is hopper
    assert not gpu.on_hopper()


def test_on_hopper_what_its_kernel_does_not_have_goes_through_triton_and_is_said(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_told", set())
    of = {name: jnp.asarray(x, jnp.bfloat16) for name, x in operands(128, 128, d=64).items()}
    went = []
    monkeypatch.setattr(gpu_triton, "forward", lambda spec, q, k, v, *_: went.append("triton") or (v, q[..., 0].swapaxes(1, 2)))
    monkeypatch.setattr(
        gpu.gpu_hopper, "forward", lambda spec, q, k, v, *_: went.append("mosaic") or (v, q[..., 0].swapaxes(1, 2))
    )
    call = functools.partial(gpu.attend, of["q"], of["k"], of["v"], masks.causal())
    ids = jnp.zeros((1, 128), jnp.int32)
    with meant_for("NVIDIA H100"), caplog.at_level(logging.INFO, "pallas_kernels"):
        call(**PLAIN)
        call(**PLAIN | {"segment_ids": Segments(ids, ids)})
        call(**PLAIN, through="triton")
    assert went == ["mosaic", "triton", "triton"]
    assert "backward pass, where one is asked for, through Pallas-Triton" in caplog.messages[0]
    assert "both passes through Pallas-Triton (segment_ids" in caplog.messages[1]
    with meant_for("NVIDIA A100"):
        call(**PLAIN)
    assert went[-1] == "triton"
    with pytest.raises(NotImplementedError, match="^segment_ids"):
        call(**PLAIN | {"segment_ids": Segments(ids, ids)}, through="mosaic")
    with pytest.raises(ValueError, match="allowed: None, 'mosaic', 'triton'"):
        call(**PLAIN, through="cuda")


def test_segments_and_packed_sequences_are_skipped():
    """Blocks without a pair of one segment are in no row: what is visited is what is paid for."""
    ids = jnp.asarray(SEGMENTS[0], jnp.int32)[None]
    kept = gpu_lists.blocked(masks.full(), gpu_lists.Sizes(67, 67, 16, 16), 1, 2, 0, Segments(ids, ids))
    ends = np.asarray(gpu_lists.visits(kept.lists, None, "row", 5).ends)[0, 0]
    assert ends[-1] < 25 and ends[-1] == int((np.asarray(kept.lists.kind) != EMPTY).sum())
