"""The TPU kernel against the reference, in Pallas's interpret mode, which sees races and reads out of bounds, but neither the
limits of VMEM nor the tiling rules: those are for `make aot`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import SelectedBlocks, block_mask, masks, reference, tpu, tpu_backward
from pallas_kernels.attention.lists import Segments
from tests.pallas_kernels.attention.implementations import TPU, watched

DEFAULTS = {"q_offset": 0, "score_mod": None, "segment_ids": None, "sinks": None, "softcap": None, "scale": 0.3}


@pytest.fixture(autouse=True)
def fresh_interpreter():
    yield
    pltpu.reset_tpu_interpret_mode_state()


def operands(q_len, kv_len, batch=1, heads=2, kv_heads=1, d=8, d_v=8, dtype=jnp.float32):
    random = np.random.default_rng(0)  # jax.random would compile for every shape
    shapes = [
        (batch, q_len, heads, d),
        (batch, kv_len, kv_heads, d),
        (batch, kv_len, kv_heads, d_v),
        (batch, q_len, heads, d_v),
    ]
    q, k, v, do = (jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes)
    return (q, k, v), (do, jnp.asarray(random.standard_normal((batch, q_len, heads)), jnp.float32))


def pulled(attend, arrays, cotangents, mask, traced, fixed):
    """(out, lse, and the gradients of the operands and the sinks). traced: arguments that are data."""

    def run(arrays, sinks, traced):
        return attend(*arrays, mask, **{**DEFAULTS, **fixed, **traced, "sinks": sinks})

    @jax.jit
    def everything(arrays, sinks, traced):
        (out, lse), pull = jax.vjp(lambda *operands: run(*operands, traced), arrays, sinks)
        finite = jnp.where(jnp.isfinite(lse), cotangents[1], 0)
        return out, lse, pull((cotangents[0], finite))

    traced = dict(traced)
    return everything(arrays, traced.pop("sinks", None), traced)


def assert_same(mask, arrays, cotangents, forward=2e-5, gradient=1e-4, traced=(), **fixed):
    traced = dict(traced)
    with watched() as kernels:
        got = pulled(functools.partial(tpu.attend, interpret=TPU), arrays, cotangents, mask, traced, fixed)
        jax.block_until_ready(got)
        assert len(kernels) == 2  # forward and backward
    wanted = pulled(reference.attend, arrays, cotangents, mask, traced, fixed)
    for name, one, other in zip(("out", "lse"), got, wanted):
        np.testing.assert_allclose(np.float32(one), np.float32(other), atol=forward, rtol=forward, err_msg=name)
    for one, other in zip(jax.tree.leaves(got[2]), jax.tree.leaves(wanted[2])):
        np.testing.assert_allclose(np.float32(one), np.float32(other), atol=gradient, rtol=gradient)
    return got


def tilted(score, batch, head, q_index, kv_index):
    return score * (1 + 0.1 * head) - 0.05 * jnp.abs(q_index - kv_index)


@pytest.mark.slow
def test_grouped_heads_ragged_lengths_and_two_head_dims():
    arrays, cotangents = operands(19, 27, batch=2, heads=4, kv_heads=2, d=8, d_v=12)
    assert_same(block_mask(masks.causal() | masks.prefix(5), 19, 27, 16, 16), arrays, cotangents)


def test_blocks_of_the_table():
    arrays, cotangents = operands(50, 50)
    assert_same(masks.window(20, 3), arrays, cotangents)


@pytest.mark.slow
def test_rows_that_see_nothing_and_keys_that_nobody_sees():
    (q, k, v), cotangents = operands(32, 32)
    k, v = k.at[:, 30].set(jnp.nan), v.at[:, 31].set(jnp.inf)
    mask = block_mask(masks.window(9, 0) & ~masks.prefix(12) & masks.prefix(30), 32, 32, 16, 16)
    out, lse, _ = assert_same(mask, (q, k, v), cotangents)
    assert not np.isnan(out).any() and (np.asarray(lse)[:, :12] == -np.inf).all()


@pytest.mark.slow
def test_a_key_that_is_not_finite_spoils_those_who_see_it():
    (q, k, v), cotangents = operands(32, 32)
    for spoilt in ((k.at[:, 20, 0, 3].set(-jnp.inf), v), (k, v.at[:, 3, 0, 1].set(jnp.inf))):
        assert_same(block_mask(masks.causal(), 32, 32, 16, 16), (q, *spoilt), cotangents)


@pytest.mark.slow
def test_sinks_and_softcap():
    arrays, cotangents = operands(32, 32)
    mask = block_mask(masks.causal() & ~masks.prefix(10), 32, 32, 16, 16)
    assert_same(mask, arrays, cotangents, traced={"sinks": jnp.array([0.5, -1.0])}, softcap=1.5)


@pytest.mark.slow
def test_score_mod():
    arrays, cotangents = operands(24, 32)
    assert_same(block_mask(masks.causal(), 24, 32, 16, 16), arrays, cotangents, score_mod=tilted, softcap=2.0, scale=-0.2)


@pytest.mark.slow
def test_a_mask_that_is_looked_up():
    arrays, cotangents = operands(32, 32)
    mask = masks.causal() & (masks.random_blocks(3, 4, 3, 32, heads=2) | masks.window(2, 0))
    assert_same(block_mask(mask, 32, 32, 16, 16, heads=2), arrays, cotangents)


@pytest.mark.slow
def test_segments_skip_blocks():
    arrays, cotangents = operands(32, 32, batch=2)
    ids = jnp.array([[0] * 16 + [1] * 16, [0] * 5 + [1] * 20 + [2] * 7])
    assert_same(block_mask(masks.causal(), 32, 32, 16, 16), arrays, cotangents, traced={"segment_ids": Segments(ids, ids)})


@pytest.mark.slow
def test_an_offset_that_is_data():
    arrays, cotangents = operands(8, 32, batch=2)
    mask = block_mask(masks.window(12, 0), 8, 32, 8, 16)
    assert_same(mask, arrays, cotangents, traced={"q_offset": jnp.array([3, 20])})


@pytest.mark.slow
def test_one_query_against_a_cache():
    # the queries of a group are rows of one block
    arrays, cotangents = operands(1, 200, batch=2, heads=4, kv_heads=2)
    traced = {"q_offset": jnp.array([100, 199]), "sinks": jnp.arange(4.0)}
    assert_same(masks.causal(), arrays, cotangents, traced=traced, score_mod=tilted)


@pytest.mark.slow
def test_selected_blocks():
    arrays, cotangents = operands(32, 48, heads=4, kv_heads=2)
    index = jnp.array([[[[0, 2], [1, 1]], [[-1, -1], [0, 1]]]])
    mask = SelectedBlocks(index, 16, 16, masks.window(None, 20))
    assert_same(mask, arrays, cotangents)


@pytest.mark.slow
def test_queries_in_two_blocks_come_by_again_and_again():
    arrays, cotangents = operands(32, 64)
    assert_same(block_mask(masks.full(), 32, 64, 16, 16), arrays, cotangents)


def test_bfloat16():
    arrays, cotangents = operands(32, 32, dtype=jnp.bfloat16)
    got = assert_same(block_mask(masks.causal(), 32, 32, 16, 16), arrays, cotangents, forward=1e-2, gradient=3e-2)
    assert got[0].dtype == jnp.bfloat16 and got[1].dtype == jnp.float32


def test_what_is_not_supported_names_the_argument():
    (q, k, v), _ = operands(32, 32)
    call = functools.partial(tpu.attend, interpret=TPU, **DEFAULTS)
    table = masks.random_blocks(0, 4, 2, 32)
    slopes = jnp.ones(2)
    for name, arguments in {
        "q": ((q.astype(jnp.float16), k, v, masks.causal()), {}),
        "score_mod": ((q, k, v, masks.causal()), {"score_mod": lambda score, b, h, *_: score * slopes[h]}),
        "q_offset": ((q, k, v, table), {"q_offset": jnp.int32(1)}),
        "segment_ids": ((q, k, v, table), {"segment_ids": Segments(*[jnp.zeros((1, 32), jnp.int32)] * 2)}),
        "mask": ((q, k, v, block_mask(masks.causal(), 32, 32, 12, 128)), {"interpret": False}),
    }.items():
        with pytest.raises(NotImplementedError, match=f"^{name}: "):
            call(*arguments[0], **{**DEFAULTS, **arguments[1]})


@pytest.mark.slow
def test_vmap():
    (q, k, v), _ = operands(16, 16, batch=2, heads=1)
    mask = block_mask(masks.causal(), 16, 16, 16, 16)

    def gradients(attend):
        def loss(q, k, v):
            return jnp.square(attend(q[None], k[None], v[None], mask, **DEFAULTS)[0]).sum()

        return jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1)), in_axes=(0, 0, None)))(q, k, v[0])

    for one, other in zip(gradients(functools.partial(tpu.attend, interpret=TPU)), gradients(reference.attend)):
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)


def racing(monkeypatch, name, method):
    """Whether the race detector finds one with a method of the accumulator replaced. Copies are made as they are started: by
    default the interpreter makes them when they are waited for, and these never would be."""
    eager = dataclasses.replace(TPU, dma_execution_mode="eager")
    jax.clear_caches()
    monkeypatch.setattr(tpu_backward._Accumulator, name, method)
    arrays, cotangents = operands(32, 48)
    mask = block_mask(masks.full(), 32, 48, 16, 16)
    jax.block_until_ready(pulled(functools.partial(tpu.attend, interpret=eager), arrays, cotangents, mask, {}, {}))
    found = interpreter.races.races_found
    jax.clear_caches()
    return found


@pytest.mark.slow
def test_the_detector_is_quiet_with_eager_copies(monkeypatch):
    assert not racing(monkeypatch, "start", tpu_backward._Accumulator.start)


def test_a_forgotten_wait_for_a_read_is_caught(monkeypatch):
    def add(self, value, turned):
        slot = self.state[tpu_backward.TURNS] & 1
        self.slots[slot] = self.slots[slot] + value

    assert racing(monkeypatch, "add", add)


def test_a_forgotten_wait_for_a_write_is_caught(monkeypatch):
    def write_held(self, held, turns):
        tpu_backward.pl.when(turns >= 1)(lambda: self._write(held, turns & 1).start())

    assert racing(monkeypatch, "_write_held", write_held)
