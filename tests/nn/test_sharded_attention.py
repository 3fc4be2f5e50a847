"""Attention on meshes: what is cut over what, and the same values and gradients as without a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import masks, sparse_attention
from research.core.mesh import RULES, axes_of, entered, make_layout
from research.nn.sharded_attention import Cut, attend, cut_of

FORWARD, GRADIENTS = 2e-5, 1e-4
MASK = masks.causal() & (masks.window(9, 0) | masks.global_tokens(3))
BY_HEAD = masks.per_head(masks.causal(), masks.window(4, 4), masks.full(), masks.prefix(5))
BY_SEQUENCE = masks.document(np.sort(np.random.default_rng(0).integers(0, 4, (4, 32)), -1))
DATA, RING, TENSOR = ("data",), ("sequence",), ("tensor",)


def operands(heads=4, kv_heads=2, batch=4, members=()):
    generator = np.random.default_rng(0)
    shapes = {"q": (batch, 32, heads, 8), "k": (batch, 32, kv_heads, 8), "v": (batch, 32, kv_heads, 8), "sinks": (heads,)}
    return {name: jnp.asarray(generator.standard_normal((*members, *shape)), jnp.float32) for name, shape in shapes.items()}


def cut(mask=MASK, heads=4, kv_heads=2, batch=4, length=32, rules=RULES, **sizes):
    with entered(make_layout(sizes, rules)):
        return cut_of((batch, length, heads, 8), kv_heads, mask)


def test_what_is_cut_over_what():
    assert cut() == Cut((), (), (), ())
    assert cut(data=2, sequence=2, tensor=2) == Cut(DATA, RING, TENSOR, TENSOR)
    assert cut(data=2, fsdp=2) == Cut(("data", "fsdp"), (), (), ())
    assert cut(data=4, batch=6) == Cut((), (), (), ())
    assert cut(tensor=4, kv_heads=1) == cut(tensor=4, kv_heads=2) == Cut((), (), TENSOR, ())
    assert cut(tensor=8) == Cut((), (), (), ())
    assert cut(tensor=4, heads=12, kv_heads=6) == Cut((), (), (), ())
    assert cut(BY_HEAD, sequence=2, tensor=2) == Cut((), RING, (), ())
    assert cut(BY_SEQUENCE, data=2, tensor=2) == Cut((), (), TENSOR, TENSOR)
    assert cut(data=2, tensor=2, rules={"batch": DATA, "heads": ("data", "tensor")}) == Cut(DATA, (), TENSOR, TENSOR)
    with pytest.raises(ValueError, match=r"^attention: length 30 is not divisible by mesh sequence=4$"):
        cut(sequence=4, length=30)


def results(call, of, sizes):
    """(outputs, gradients) under a mesh of these sizes."""

    def loss(of):
        out = call(of)
        return jnp.sum(jnp.sin(out)), out

    with entered(make_layout(sizes)):
        (_, out), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(of)
        return jax.device_get((out, slopes))


def near(got, wanted):
    for a, b, most in zip(got, wanted, (FORWARD, GRADIENTS)):
        jax.tree.map(lambda a, b, most=most: np.testing.assert_allclose(a, b, atol=most, rtol=most), a, b)


def called(function, mask, of, segments=None, implementation=None):
    return function(
        of["q"], of["k"], of["v"], mask, sinks=of["sinks"], segment_ids=segments, implementation=implementation
    )  # fmt: skip


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "mask, shape, sizes",
    [
        (MASK, {"kv_heads": 1}, {"sequence": 2, "tensor": 4}),
        (BY_SEQUENCE, {"kv_heads": 2}, {"data": 2, "tensor": 4}),
        slow(MASK, {}, {"data": 2, "sequence": 2, "tensor": 2}),
        slow(MASK, {"kv_heads": 2}, {"data": 2, "tensor": 4}),
        slow(BY_HEAD, {}, {"data": 2, "sequence": 2, "tensor": 2}),
        slow(MASK, {"batch": 3}, {"data": 2, "sequence": 4}),
        slow(BY_SEQUENCE, {}, {"data": 2, "sequence": 2, "tensor": 2}),
    ],
)
@pytest.mark.parametrize("implementation", ["reference", slow(None)])
def test_values_and_gradients_are_those_of_one_device(mask, shape, sizes, implementation):
    of = operands(**shape)
    segments = jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 3, of["q"].shape[:2]), -1), jnp.int32)
    options = {"segments": segments, "implementation": implementation}
    got = results(functools.partial(called, attend, mask, **options), of, sizes)
    near(got, results(functools.partial(called, sparse_attention, mask, **options), of, {}))


def test_without_a_mesh_nothing_is_added():
    of = operands()
    programs = [str(jax.make_jaxpr(functools.partial(called, function, MASK))(of)) for function in (attend, sparse_attention)]
    assert programs[0] == programs[1]


def layers(function, of):
    """Two layers, scanned, their insides computed again backward."""

    @jax.checkpoint
    def layer(x, _):
        return x + called(function, MASK, {**of, "q": x}, implementation="reference"), None

    return jax.lax.scan(layer, of["q"], None, length=2)[0]


@pytest.mark.parametrize("sizes", [{"population": 2, "sequence": 2, "tensor": 2}, slow({"population": 2, "data": 4})])
@pytest.mark.slow
def test_members_of_a_population_lie_on_their_devices(sizes):
    of = operands(members=(2,))

    def members(function, of):
        return jax.vmap(functools.partial(layers, function), spmd_axis_name=axes_of("population") or None)(of)

    near(results(functools.partial(members, attend), of, sizes), results(functools.partial(members, sparse_attention), of, {}))


@pytest.mark.slow
def test_within_a_shard_map_over_other_axes():
    """As in a stage of a pipeline."""
    of = operands(members=(2,))

    def stage(of):
        assert not axes_of("layers") and axes_of("length")
        return layers(attend, jax.tree.map(lambda x: x[0], of))[None]

    def pipeline(of):
        over = jax.P("pipeline")
        return jax.shard_map(stage, in_specs=(over,), out_specs=over, axis_names={"pipeline"}, check_vma=False)(of)

    got = results(pipeline, of, {"pipeline": 2, "data": 2, "sequence": 2})
    near(got, results(jax.vmap(functools.partial(layers, sparse_attention)), of, {}))
