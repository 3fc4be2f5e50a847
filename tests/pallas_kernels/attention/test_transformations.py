"""Attention under vmap, checkpoint, meshes and second derivatives; and step by step against a cache."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention import SelectedBlocks, api, block_mask, masks, sparse_attention, tpu
from tests.pallas_kernels.attention.implementations import of as checked
from tests.pallas_kernels.attention.implementations import with_properties
from tests.pallas_kernels.kernel_base import FORWARD, GRADIENTS, compiled, results, runner, same, same_results

WINDOW = block_mask(masks.window(9, 0), 37, 37, 16, 16)


def operands(batch=2, q_len=37, kv_len=37, heads=4, kv_heads=2, d=8):
    generator = np.random.default_rng(1)
    shapes = {"q": (batch, q_len, heads, d), "k": (batch, kv_len, kv_heads, d), "v": (batch, kv_len, kv_heads, d)}
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def windowed(implementation, of, mask=WINDOW, **arguments):
    return sparse_attention(of["q"], of["k"], of["v"], mask, implementation=implementation, return_lse=True, **arguments)


def looped(one):
    """As vmap does, but one after the other."""
    return lambda *arguments: jax.lax.map(lambda each: one(*each), arguments)


@pytest.mark.slow
@with_properties
def test_vmap_over_everything_is_a_loop(implementation):
    """Also over what is data: segments, offsets, selected blocks, sinks."""
    generator = np.random.default_rng(2)
    of = operands(batch=6)
    of = {name: x.reshape(3, 2, *x.shape[1:]) for name, x in of.items()}
    of["sinks"] = generator.standard_normal((3, 4)).astype(np.float32)
    segments = np.sort(generator.integers(0, 3, (3, 2, 37)), axis=-1)
    offsets, picked = np.array([0, 3, 9], np.int32), generator.integers(-1, 3, (3, 1, 2, 3, 2)).astype(np.int32)

    def packed(of, segments, offset):
        return windowed(implementation, of, sinks=of["sinks"], segment_ids=segments, q_offset=offset)

    def chosen(of, index):
        return windowed(implementation, of, SelectedBlocks(index, 16, 16, masks.causal()), sinks=of["sinks"])

    with checked(implementation).context():
        for one, data in ((packed, (segments, offsets)), (chosen, (picked,))):
            same_results(runner(jax.vmap(one))(of, *data), runner(looped(one))(of, *data))


@with_properties
def test_vmap_over_queries_alone(implementation):
    of = operands()
    of["q"] = np.stack([of["q"], 2 * of["q"], -of["q"]])

    def mapped(over):
        return lambda of: over(lambda q: windowed(implementation, {**of, "q": q}))(of["q"])

    with checked(implementation).context():
        same_results(results(mapped(jax.vmap), of), results(mapped(looped), of))


@with_properties
def test_checkpoint_changes_nothing(implementation):
    call = functools.partial(windowed, implementation)
    with checked(implementation).context():
        same_results(results(jax.checkpoint(call), operands()), results(call, operands()))


@with_properties
def test_shards_by_batch_and_heads_are_the_whole(implementation):
    """In shard_map, which checks what varies over which axis; and where the compiler shards by itself."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    of = operands()
    of["sinks"] = np.random.default_rng(3).standard_normal(4).astype(np.float32)
    ids = np.sort(np.random.default_rng(3).integers(0, 3, (2, 37)), axis=-1).astype(np.int32)
    specs = {**dict.fromkeys("qkv", P("data", None, "tensor")), "sinks": P("tensor")}

    def call(of, ids=ids):
        return windowed(implementation, of, sinks=of["sinks"], segment_ids=ids)

    with checked(implementation).context():
        expected = results(call, of)
        sharded = jax.shard_map(call, mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data", None, "tensor"))
        same_results(results(lambda of: sharded(of, ids), of), expected)
        placed = {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in of.items()}
        with jax.set_mesh(mesh):
            same_results(results(call, placed), expected)


def test_sequences_are_looped_over_unless_a_mesh_may_split_them():
    """shard_map that took all axes of more than one device leaves a device its own sequences, one after another."""
    of, ids = operands(batch=5), np.zeros((5, 37), np.int32)

    def looped(sizes, taken):
        mesh = jax.make_mesh(sizes, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

        def call(of):
            return windowed("xla", of, segment_ids=ids)

        if taken:
            call = jax.shard_map(call, mesh=mesh, in_specs=P(), out_specs=P(), axis_names=taken, check_vma=False)
        with jax.set_mesh(mesh):
            return "length=5" in str(jax.make_jaxpr(call)(of))

    assert "length=5" in str(jax.make_jaxpr(lambda of: windowed("xla", of, segment_ids=ids))(of))
    assert looped((2, 2), {"data", "tensor"}) and looped((2, 1), {"data"}) and looped((1, 1), set())
    assert not looped((2, 2), set()) and not looped((2, 2), {"data"})


@with_properties
def test_second_derivatives_are_the_references(implementation):
    """Reverse over reverse, for masks that are known: of a Hessian's product with a vector, through the log-sum-exp too."""
    of = operands(batch=1, q_len=20, kv_len=20)
    mask = block_mask(masks.causal(), 20, 20, 8, 8)

    def slopes(implementation):
        def loss(of):
            out, lse = windowed(implementation, of, mask, softcap=3.0)
            return jnp.sum(jnp.sin(out)) + jnp.sum(lse**2)

        return jax.grad(loss)

    with checked(implementation).context():
        same_results(results(slopes(implementation), of), results(slopes("reference"), of), GRADIENTS, GRADIENTS)


@pytest.mark.slow
def test_second_derivatives_where_lists_are_data_are_the_references():
    """Selected blocks, segments, an offset; masks by head; queries that see nothing. Hessian times vector, reverse over reverse
    and forward over reverse."""
    of = operands(batch=1, q_len=11, kv_len=11, heads=2, kv_heads=1, d=4)
    mask = masks.per_head(masks.causal(), masks.window(3, 0))
    mask = SelectedBlocks(np.array([[[[0, 1], [-1, -1], [2, 0]]]]), 4, 4, mask)
    arguments = {"segment_ids": np.repeat([[0, 1, 2]], [4, 2, 5], axis=1), "q_offset": jnp.int32(1)}

    def curved(implementation, of):
        def loss(of):
            out, lse = windowed(implementation, of, mask, **arguments)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0) ** 2)

        along = jax.tree.map(lambda x: x[:, ::-1], of)
        slope, pull = jax.vjp(jax.grad(loss), of)
        return pull(along)[0], jax.jvp(jax.grad(loss), (of,), (along,))[1]

    twice, forward = compiled(functools.partial(curved, "xla"))(of)
    expected = compiled(lambda of: curved("reference", of)[0])(of)
    same(twice, expected, GRADIENTS)
    same(forward, expected, GRADIENTS)


@pytest.mark.parametrize("arguments", [{}, {"segment_ids": np.zeros((2, 37), int)}], ids=["known", "segments"])
def test_forward_mode_names_what_to_use(arguments):
    """By whatever it is asked for; and reverse mode of a part, of mapped, looped and checkpointed calls is none."""
    of = jax.tree.map(jnp.asarray, operands())

    def loss(q):
        return windowed("xla", {**of, "q": q}, **arguments)[0].sum()

    asked = {
        "jvp": lambda q: jax.jvp(loss, (q,), (q,)),
        "jacfwd": jax.jacfwd(lambda x: loss(x * of["q"])),
        "linearize": lambda q: jax.linearize(loss, q)[1](q),
        "checkpoint": lambda q: jax.jvp(jax.checkpoint(loss), (q,), (q,)),
    }
    for name, ask in asked.items():
        for run in (ask, jax.jit(ask)):
            with pytest.raises(NotImplementedError, match=r"^implementation: 'xla' has no forward mode .*='reference'"):
                run(jnp.float32(1) if name == "jacfwd" else of["q"])

    def looped_over(q):
        return jax.lax.scan(lambda q, _: (windowed("xla", {**of, "q": q}, **arguments)[0], None), q, None, length=2)[0].sum()

    several = jnp.stack([of["q"]] * 2)
    for function, given in (
        (looped_over, of["q"]),
        (jax.checkpoint(looped_over), of["q"]),
        (lambda q: jax.vmap(loss)(q).sum(), several),
    ):
        jax.jit(jax.grad(function)).lower(given)


@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
def test_kernels_name_what_has_further_derivatives(implementation):
    """When they are traced; first derivatives, of checkpointed and looped calls too, are not refused."""
    of = jax.tree.map(jnp.asarray, operands())

    def loss(q):
        return windowed(implementation, {**of, "q": q}, masks.causal())[0].sum()

    def slope(q):
        return jax.grad(lambda q: jax.lax.scan(lambda q, _: (q * jax.checkpoint(loss)(q), None), q, None, length=2)[0].sum())(q)

    with checked(implementation).context() if implementation == "gpu" else interpreted_tpu():
        jax.make_jaxpr(slope)(of["q"])
        for twice in (lambda q: jax.grad(lambda q: jax.grad(loss)(q).sum())(q), lambda q: jax.jvp(jax.grad(loss), (q,), (q,))):
            with pytest.raises(
                NotImplementedError, match=rf"^implementation: '{implementation}' has first derivatives only; for"
            ):
                jax.make_jaxpr(twice)(of["q"])
        with pytest.raises(
            NotImplementedError, match=rf"^implementation: '{implementation}' has no forward mode .*='reference'"
        ):
            jax.jit(lambda q: jax.jvp(loss, (q,), (q,))).lower(of["q"])


@contextlib.contextmanager
def interpreted_tpu():
    """For what is traced only: that kernels ran is not looked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(api.IMPLEMENTATIONS, "tpu", functools.partial(tpu.attend, interpret=True))
        yield


@with_properties
def test_decoding_step_by_step_is_the_whole_pass(implementation):
    """One query at a time against the cache, whose positions to come hold NaN; offsets are data of the step."""
    of = operands()
    mask = masks.window(9, 0) | (masks.causal() & masks.prefix(3))

    def step(i):
        unwritten = jnp.arange(37)[None, :, None, None] > i
        k, v = (jnp.where(unwritten, jnp.nan, of[name]) for name in "kv")
        now = {"q": jax.lax.dynamic_slice_in_dim(jnp.asarray(of["q"]), i, 1, axis=1), "k": k, "v": v}
        return windowed(implementation, now, mask, q_offset=i)

    with checked(implementation).context():
        whole = compiled(lambda of: windowed(implementation, of, mask))(of)
        steps = compiled(lambda: jax.lax.map(step, jnp.arange(37)))()
        stepped = jax.tree.map(lambda x: jnp.moveaxis(x[:, :, 0], 0, 1), steps)
        same(stepped, whole, FORWARD)
        late = compiled(lambda of: windowed(implementation, of, mask, q_offset=30))({**of, "q": of["q"][:, 30:31]})
        same(late, jax.tree.map(lambda x: x[:, 30:31], whole), FORWARD)


@with_properties
def test_sequences_at_their_own_places_are_decoded_together(implementation):
    """q_offset [batch]: each sequence's result is what it has alone, at its offset."""
    of = operands(q_len=1)
    offsets = np.array([5, 30], np.int32)
    with checked(implementation).context():
        call = compiled(lambda of, offset: windowed(implementation, of, masks.window(9, 0), q_offset=offset))
        together = call(of, offsets)
        for b in range(2):
            alone = call({name: x[b : b + 1] for name, x in of.items()}, offsets[b])
            same(jax.tree.map(lambda x: x[b : b + 1], together), alone, FORWARD)  # noqa: B023


def test_a_query_that_sees_nothing_has_no_influence_even_if_it_is_nan():
    q, k, v = (jax.random.normal(key, (1, 40, 2, 8)) for key in jax.random.split(jax.random.key(0), 3))
    mask = masks.window(2, 0) & ~masks.prefix(3)  # the first three queries see nothing
    gradients = jax.grad(lambda q, k, v: sparse_attention(q, k, v, mask, implementation="xla").sum(), (0, 1, 2))
    for got, wanted in zip(gradients(q.at[0, 0].set(jnp.nan), k, v), gradients(q, k, v)):
        np.testing.assert_array_equal(got, wanted)


def test_float16_does_not_overflow_where_the_scale_is_large():
    q, k, v = (jax.random.normal(key, (1, 40, 2, 8), jnp.float16) for key in jax.random.split(jax.random.key(0), 3))
    for scale in (1e5, 2e-8):
        got, wanted = (sparse_attention(q, k, v, masks.causal(), scale=scale, implementation=i) for i in ("xla", "reference"))
        np.testing.assert_allclose(got, wanted, atol=2e-3)
