"""The kernel for Hopper in Mosaic GPU's interpreter: values, gradients (by Triton's kernels), races.

The interpreter runs its threads and barriers and watches memory; it has no wgmma as it is used here (bfloat16, a transposed
operand) nor layouts, which the kernel leaves out for it. Those are the compile matrix's part.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# Private in JAX 0.10.2; `plgpu.InterpretGPUParams` from 0.12 on.
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from pallas_kernels.attention import SelectedBlocks, block_mask, gpu, gpu_hopper, masks, reference
from tests.pallas_kernels.kernel_base import Results, as_plain, cotangents, results

PLAIN = {"q_offset": 0, "score_mod": None, "segment_ids": None, "sinks": None, "softcap": None, "scale": 0.125}
WATCHED = InterpretGPUParams(detect_races=True)
BLOCKS = functools.partial(block_mask, q_block=128, kv_block=64)


@pytest.fixture(autouse=True)
def clean():
    gpu_callbacks.reset_gpu_interpret_mode_state()
    yield
    gpu_callbacks.reset_gpu_interpret_mode_state()


def operands(q_len, kv_len, heads=1, d=64, d_v=64):
    generator = np.random.default_rng(0)
    shapes = {"q": (1, q_len, heads, d), "k": (1, kv_len, 1, d), "v": (1, kv_len, 1, d_v)}
    return {name: jnp.asarray(generator.standard_normal(shape), jnp.bfloat16) for name, shape in shapes.items()}


def of_kernel(mask, **arguments):
    arguments = PLAIN | arguments
    return lambda of: gpu.attend(of["q"], of["k"], of["v"], mask, **arguments, through="mosaic", interpret=WATCHED)


def exact(mask, of, **arguments):
    """The reference's values and gradients, in float32, of the same operands and cotangents."""
    call = lambda of: reference.attend(of["q"], of["k"], of["v"], mask, **PLAIN | arguments)  # noqa: E731
    values, pull = jax.vjp(call, {name: x.astype(jnp.float32) for name, x in of.items()})
    drawn = cotangents((values[0].astype(jnp.bfloat16), values[1]))
    return Results(values, pull(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), drawn))[0])


def plainly(mask, **arguments):
    """Attention in bfloat16 as one writes it: products in bfloat16, the softmax in float32."""

    def call(of):
        q, k, v = of["q"], *(jnp.repeat(of[name], of["q"].shape[2], axis=2) for name in "kv")
        score = arguments.get("scale", PLAIN["scale"]) * jnp.einsum("bthd,bshd->bhts", q, k)
        index = [jnp.arange(n).reshape([-1 if i == axis else 1 for i in range(4)]) for axis, n in enumerate(score.shape)]
        score = jnp.where(reference.visible(mask, *index, 0), score.astype(jnp.float32), -jnp.inf)
        weight = jax.nn.softmax(score, axis=-1).astype(q.dtype)
        return jnp.einsum("bhts,bshd->bthd", weight, v), jax.nn.logsumexp(score, axis=-1).swapaxes(1, 2)

    return call


@pytest.mark.slow
def test_values_and_gradients_round_as_plain_jaxs():
    of, mask = operands(128, 128, heads=2), BLOCKS(masks.window(70, 40), 128, 128)
    as_plain(results(of_kernel(mask), of), results(plainly(mask), of), exact(mask, of))
    assert not gpu_callbacks.get_races().races_found


index = jnp.array([[[[2, 0, -1], [-1, -1, -1]]]], jnp.int32)
CASES = {
    "more tiles than stages, other values, softcap and sink": (
        (128, 384, 1, 64, 128), BLOCKS(masks.full(), 128, 384), {"softcap": 2.0, "sinks": jnp.array([0.5])}),
    "ragged, at an offset, rows that see nothing": (
        (70, 300), masks.window(9, 0) & ~masks.prefix(270), {"q_offset": jnp.array([240], jnp.int32)}),
    "selected blocks, a row without any": ((256, 256), SelectedBlocks(index, 128, 64, masks.causal()), {}),
}  # fmt: skip


LONG = ("selected blocks, a row without any", "more tiles than stages, other values, softcap and sink",
        "ragged, at an offset, rows that see nothing")  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in CASES])
def test_values_are_the_references(name):
    sizes, mask, arguments = CASES[name]
    of = operands(*sizes)
    got = jax.jit(of_kernel(mask, **arguments))(of)
    expected = exact(mask, of, **arguments).values
    for mine, wanted, tolerance in zip(got, expected, (2**-7, 2e-5)):
        np.testing.assert_allclose(np.asarray(mine, np.float32), wanted, rtol=tolerance, atol=tolerance)
    assert not gpu_callbacks.get_races().races_found


def test_keys_that_are_not_finite_change_only_what_sees_them():
    of = operands(128, 128)
    of = {**of, "k": of["k"].at[0, 100, 0, 3].set(-jnp.inf), "v": of["v"].at[0, 60, 0, 5].set(jnp.nan)}
    mask = BLOCKS(masks.window(10, 0), 128, 128)
    out, lse = jax.jit(of_kernel(mask))(of)
    spoilt = [*range(60, 71), *range(100, 111)]
    assert np.flatnonzero(np.isnan(lse[0, :, 0])).tolist() == spoilt
    assert np.flatnonzero(np.isnan(out[0, :, 0]).all(-1)).tolist() == spoilt
    assert np.flatnonzero(np.isnan(out[0, :, 0]).any(-1)).tolist() == spoilt


def test_a_race_is_seen(monkeypatch):
    """Keys that are read once more after they were given back, while the next ones may come into their place."""
    scores, summed, kept = gpu_hopper._scores, gpu_hopper._summed, []

    def reads(q_tile, k_tile, *rest):
        kept.append(k_tile)
        return scores(q_tile, k_tile, *rest)

    def reads_again(acc, weight, v_tile, interpret):
        return summed(acc + 0 * kept.pop()[0, 0].astype(jnp.float32), weight, v_tile, interpret)

    monkeypatch.setattr(gpu_hopper, "_scores", reads)
    monkeypatch.setattr(gpu_hopper, "_summed", reads_again)
    jax.block_until_ready(jax.jit(of_kernel(BLOCKS(masks.full(), 128, 384)))(operands(128, 384)))
    assert gpu_callbacks.get_races().races_found


REFUSED = {
    "q: float32": ({"dtype": jnp.float32}, masks.causal(), {}),
    "q: head dimension 32": ({"d": 32}, masks.causal(), {}),
    "q: 16 queries": ({"q_len": 16}, masks.causal(), {}),
    "v: head dimension 96": ({"d_v": 96}, masks.causal(), {}),
    "score_mod": ({}, masks.causal(), {"score_mod": lambda score, *_: score}),
    "segment_ids": ({}, masks.causal(), {"segment_ids": (jnp.zeros((1, 128), int),) * 2}),
    "scale": ({}, masks.causal(), {"scale": -1.0}),
    "mask: it looks at arrays": ({}, masks.document(np.arange(128) // 9), {}),
    "mask: blocks of 64 x 64": ({}, block_mask(masks.causal(), 128, 128, 64, 64), {}),
}


@pytest.mark.parametrize("start", REFUSED)
def test_what_is_not_supported_is_refused_by_name(start):
    sizes, mask, arguments = REFUSED[start]
    dtype = sizes.get("dtype", jnp.bfloat16)
    of = operands(sizes.get("q_len", 128), 128, d=sizes.get("d", 64), d_v=sizes.get("d_v", 64))
    with pytest.raises(NotImplementedError, match=f"^{start}"):
        of_kernel(mask, **arguments)({name: x.astype(dtype) for name, x in of.items()})
