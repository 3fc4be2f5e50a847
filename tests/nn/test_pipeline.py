"""Layers as stages of a pipeline compute what they compute one after another."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.core.collectives import collectives
from research.core.mesh import RULES, Pipeline, constrained, entered, make_layout
from research.nn import stack
from research.nn.functional import functional, param
from research.nn.pipeline import SCHEDULES, bubble_share, cut, joined, leaving, turn

KEY = jax.random.key(0)
BATCH, LENGTH, WIDTH, LAYERS = 16, 3, 6, 16


class Layer(nnx.Module):
    """[batch, length, width] -> the same; two kinds, as layers that repeat with period 2 are."""

    def __init__(self, kind, dropout, counts, rngs):
        self.kind = kind
        self.a = param(jax.random.normal(rngs.params(), (WIDTH, WIDTH)) * 0.4, "embed", None)
        self.b = nnx.Param(jax.random.normal(rngs.params(), (WIDTH,)))
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None
        self.calls = nnx.BatchStat(jnp.zeros(())) if counts else None

    def __call__(self, x):
        if self.calls is not None:
            self.calls[...] = self.calls[...] + 1
        x = 0.3 * x @ self.a[...] + (jnp.sin(x) if self.kind else x) + self.b[...][None, None]
        return constrained(x if self.dropout is None else self.dropout(x), "batch", "length", "embed")


class Model(nnx.Module):
    def __init__(self, layers, rngs, *, dropout=0.0, scan=True, counts=False, outputs=False, twice=False):
        self.scan, self.outputs, self.twice = scan, outputs, twice
        self.blocks = stack.build(lambda kind, r: Layer(kind, dropout, counts, r), layers, 2, scan, rngs)

    def _run(self, x):
        return stack.run(self.blocks, lambda b, x, _: (b(x), x if self.outputs else None), x, scan=self.scan)[0]

    def __call__(self, x):
        return (self._run(x), self._run(x)) if self.twice else self._run(x)


def made(layers=LAYERS, **options):
    return functional(lambda rngs: Model(layers, rngs, **options))


def inputs():
    return jax.random.normal(jax.random.key(1), (BATCH, LENGTH, WIDTH))


def layout(sizes, *pipeline):
    return make_layout(sizes, RULES, Pipeline(*pipeline))


def differentiated(where, f=None):
    """(value, gradients, the compiled program) of a loss that weighs every output by its place."""
    f = f or made()
    variables, x = f.init(KEY), inputs()
    weights = jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape) / x.size

    def loss(params, x):
        return (weights * f.apply({**variables, "params": params}, x)[0] ** 2).mean()

    params = variables["params"]
    with entered(where):
        if where:
            params = jax.device_put(params, where.shardings(f.axes["params"], params, "params"))
            x = jax.device_put(x, jax.NamedSharding(where.mesh, where.spec(("batch",), x.shape, "x")))
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(params, x).compile()
        return *compiled(params, x), compiled


@functools.cache
def alone():
    return differentiated(None)[:2]


def check_equals_alone(where):
    value, grads, compiled = differentiated(where)
    expected, expected_grads = alone()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * float(jnp.abs(wanted).max()))
    return grads, compiled


FEW = [
    ({"pipeline": 2}, "gpipe", 2),
    ({"pipeline": 4, "data": 2}, "gpipe", 8),
    ({"pipeline": 4}, "interleaved", 4, 2),
]
MANY = [
    ({"pipeline": 2}, "gpipe", 1),
    ({"pipeline": 2}, "gpipe", 4),
    ({"pipeline": 2}, "gpipe", 8),
    ({"pipeline": 4}, "gpipe", 2),
    ({"pipeline": 4}, "gpipe", 4),
    ({"pipeline": 8}, "gpipe", 4),
    ({"pipeline": 2, "data": 2, "fsdp": 2}, "gpipe", 4, 1, False),
    ({"pipeline": 2, "data": 2}, "interleaved", 2, 2),
    ({"pipeline": 2, "data": 2}, "interleaved", 8, 4),
    ({"pipeline": 4, "data": 2}, "interleaved", 8, 2),
]


@pytest.mark.parametrize("sizes, schedule", [(s, p) for s, *p in FEW])
def test_values_and_gradients_are_those_of_one_device(sizes, schedule):
    grads, compiled = check_equals_alone(layout(sizes, *schedule))
    kernel = grads[0]["blocks"]["0"]["a"]
    assert kernel.sharding.shard_shape(kernel.shape)[0] == kernel.shape[0] // sizes["pipeline"]
    found = collectives(compiled.as_text())
    assert not [c for c in found if c.kind in ("all-gather", "all-to-all")]
    assert [c for c in found if c.kind == "collective-permute"]


@pytest.mark.slow
@pytest.mark.parametrize("sizes, schedule", [(s, p) for s, *p in MANY])
def test_values_and_gradients_are_those_of_one_device_on_more_meshes(sizes, schedule):
    check_equals_alone(layout(sizes, *schedule))


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("waves", [1, 2, 3])
def test_every_microbatch_goes_through_every_part_in_order_and_without_waiting(stages, groups, waves):
    n = waves * stages
    ticks = groups * n + stages - 1
    done = {}  # (microbatch, part): the tick
    for device in range(stages):
        for tick in range(device, device + groups * n):
            group, microbatch = (int(x) for x in turn(jnp.int32(tick - device), stages, groups, n))
            done[microbatch, group * stages + device] = tick
    assert len(done) == n * stages * groups  # each pair once
    for microbatch in range(n):
        at = [done[microbatch, part] for part in range(stages * groups)]
        assert at == list(range(at[0], at[0] + stages * groups))
        assert at[-1] == leaving(stages, groups, n)[microbatch]
    idle = 1 - len(done) / (stages * ticks)
    schedule = "gpipe" if groups == 1 else "interleaved"
    assert bubble_share(schedule, stages, n, groups) == pytest.approx(idle)


def test_gpipe_takes_any_number_of_microbatches():
    for stages, n in [(2, 1), (4, 3), (3, 8)]:
        assert leaving(stages, 1, n).tolist() == list(range(stages - 1, n + stages - 1))
        assert [int(turn(jnp.int32(t), stages, 1, n).microbatch) for t in (-1, 0, n - 1, n)] == [0, 0, n - 1, n - 1]
        assert bubble_share("gpipe", stages, n, 1) == pytest.approx((stages - 1) / (n + stages - 1))


def test_microbatches_are_cut_by_stride():
    x = jnp.arange(12.0).reshape(6, 2)
    assert cut(x, 3)[1, :, 0].tolist() == [2.0, 8.0]
    np.testing.assert_array_equal(joined(cut(x, 3)), x)


def dropped(where, key=KEY, **options):
    """Outputs of layers that add 1 to what dropout leaves of theirs, so that they tell what was dropped."""
    f = made(8, dropout=0.5, **options)
    variables = f.init(KEY)
    params = jax.tree.map(jnp.zeros_like, variables["params"])
    for block in params["blocks"].values():
        block["b"] = jnp.ones_like(block["b"])
    x = jnp.zeros((BATCH, LENGTH, WIDTH))
    with entered(where):
        run = jax.jit(lambda x, key: f.apply({**variables, "params": params}, x, key=key, train=True)[0])
        return jax.tree.map(np.asarray, run(x, key))


@pytest.mark.slow
def test_dropout_differs_by_microbatch_and_pass_and_not_by_schedule():
    first, second = dropped(layout({"pipeline": 2}, "gpipe", 4), twice=True)
    again = dropped(layout({"pipeline": 2}, "interleaved", 4, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, second)
    microbatches = np.asarray(cut(first, 4))
    assert all(not np.array_equal(microbatches[0], other) for other in microbatches[1:])
    assert not np.array_equal(first, dropped(layout({"pipeline": 2}, "gpipe", 4), jax.random.key(7)))


REFUSED = [
    ({}, {}, ("gpip",), "pipeline.schedule='gpip' is unknown; allowed: gpipe, interleaved; nearest: 'gpipe'"),
    ({}, {}, ("gpipe", 4, 2), "pipeline.groups=2 with pipeline.schedule='gpipe'; allowed: 1"),
    ({}, {}, ("interleaved", 4, 1), "pipeline.groups=1 with pipeline.schedule='interleaved'; allowed: 2 or more"),
    ({}, {}, ("interleaved", 3, 2), "pipeline.microbatches=3 is not divisible by mesh.pipeline=2; nearest: 2 or 4"),
    ({}, {}, ("interleaved", 2, 2, False), "pipeline.remat=False with pipeline.schedule='interleaved'"),
    ({}, {}, ("gpipe", 3), "pipeline.microbatches=3 does not divide the batch of 16"),
    ({"data": 4}, {}, ("gpipe", 8), "microbatches of 2, which mesh data=4 does not divide; allowed: divisors of 4"),
    ({}, {"layers": 6}, ("gpipe", 2), "stacked layers=3 is not divisible by mesh.pipeline x pipeline.groups=2"),
    ({}, {"scan": False}, ("gpipe", 2), "model.scan_layers=False under mesh.pipeline above 1"),
    ({}, {"counts": True}, ("gpipe", 2), "mesh.pipeline above 1: calls of a layer is state"),
    ({}, {"outputs": True}, ("gpipe", 2), "mesh.pipeline above 1: layers give outputs beside the carry"),
]


@pytest.mark.parametrize("sizes, model, schedule, says", REFUSED)
def test_what_cannot_be_a_pipeline_is_one_line(sizes, model, schedule, says):
    f = made(**{"layers": LAYERS, **model})
    variables = jax.eval_shape(f.init, KEY)
    with entered(layout({"pipeline": 2, **sizes}, *schedule)), pytest.raises(ValueError, match=says) as error:
        jax.eval_shape(f.apply, variables, inputs())
    assert "\n" not in str(error.value)


def test_every_schedule_is_known_by_its_share_of_waiting():
    shares = {name: bubble_share(name, 4, 8, 1 if name == "gpipe" else 2) for name in SCHEDULES}
    assert shares == {"gpipe": 3 / 11, "interleaved": 3 / 19}


@pytest.mark.slow
def test_what_is_kept_for_the_backward_pass_is_the_inputs_of_stages():
    temporaries = {
        options: differentiated(layout({"pipeline": 2}, *options))[2].memory_analysis().temp_size_in_bytes
        for options in [("gpipe", 4, 1, True), ("gpipe", 4, 1, False)]
    }
    assert temporaries["gpipe", 4, 1, True] < temporaries["gpipe", 4, 1, False]
