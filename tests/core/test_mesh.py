"""Logical names to mesh axes: what is laid where, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from configs.base import base
from research.core.mesh import AXES, axes_of, constrained, entered, make_layout, size_of, spec_of
from research.core.mesh import RULES as DEFAULT_RULES
from research.core.types import Spec

RULES = {"batch": ("data", "fsdp"), "embed": ("fsdp",)}


def test_one_device_needs_no_mesh():
    assert make_layout({"data": 1, "fsdp": 1}, RULES) is None


def test_an_open_size_takes_what_devices_are_left():
    layout = make_layout({"data": -1, "fsdp": 2}, RULES)
    assert dict(layout.mesh.shape) == {"data": len(jax.devices()) // 2, "fsdp": 2}


def test_names_without_a_rule_and_axes_of_size_one_are_whole():
    layout = make_layout({"data": 2, "fsdp": 1}, RULES)
    assert dict(layout.mesh.shape) == {"data": 2}
    assert layout.spec(("batch", "embed", None), (4, 6, 5), "x") == P("data", None, None)
    both = make_layout({"data": 2, "fsdp": 2}, RULES)
    assert both.spec(("batch", "length"), (8, 5), "x") == P(("data", "fsdp"), None)


def test_shardings_place_arrays_as_said():
    layout = make_layout({"data": 1, "fsdp": 4}, RULES)
    shardings = layout.shardings({"w": P("embed", "mlp")}, {"w": jnp.zeros((8, 3))}, "state")
    placed = jax.device_put(jnp.zeros((8, 3)), shardings["w"])
    assert placed.addressable_shards[0].data.shape == (2, 3)
    assert layout.batch_shardings({"x": Spec((8, 2), jnp.float32, ("batch",))})["x"].spec == P("fsdp", None)


@pytest.mark.parametrize(
    "sizes, rules, says",
    [
        ({"dat": 2}, RULES, "mesh.dat: no such mesh axis; allowed: population, .*, tensor; nearest: 'data'"),
        ({"data": 3, "fsdp": 5}, RULES, "mesh data=3, fsdp=5: .* 15; allowed: at most 8 devices"),
        ({"data": -1, "fsdp": -1}, RULES, "at most one is -1"),
        ({"data": -1, "fsdp": 3}, RULES, "a divisor of 8 devices"),
        ({"data": 0, "fsdp": 2, "tensor": 1}, RULES, "^mesh data=0, fsdp=2; allowed: sizes are 1 or more"),
        ({"data": 2}, {"batch": ("dta",)}, "mesh rule 'batch': no mesh axis 'dta'; allowed: .*; nearest: 'data'"),
    ],
)
def test_a_mesh_that_cannot_be_is_one_line(sizes, rules, says):
    with pytest.raises(ValueError, match=says):
        make_layout(sizes, rules)


def test_a_mesh_axis_used_twice_on_an_array_is_named():
    layout = make_layout({"fsdp": 2}, {"embed": ("fsdp",), "mlp": ("fsdp",)})
    with pytest.raises(ValueError, match=r"mesh axis 'fsdp' is used twice on state params/w \(4, 4\): dimensions 0 and 1"):
        layout.shardings({"params": {"w": P("embed", "mlp")}}, {"params": {"w": jnp.zeros((4, 4))}}, "state")


def test_the_mesh_is_the_ambient_one_only_inside():
    layout = make_layout({"data": 2}, RULES)
    with entered(layout):
        assert jax.sharding.get_abstract_mesh().shape["data"] == 2
    assert jax.sharding.get_abstract_mesh().empty


def test_layers_ask_by_logical_name_and_know_no_mesh_axis():
    layout = make_layout({"data": 2, "fsdp": 2, "tensor": 2}, {**RULES, "heads": ("tensor",), "length": ("sequence",)})
    x = jnp.zeros((8, 3, 4))
    assert axes_of("batch") == () and spec_of(("batch", None, "heads"), x.shape) == P(None, None, None)
    assert constrained(x, "batch", None, "heads") is x
    with entered(layout):
        assert axes_of("batch") == ("data", "fsdp") and axes_of("length") == () and axes_of("unknown") == ()
        assert size_of(axes_of("batch")) == 4
        # "embed" would want fsdp, which "batch" has; three heads are left whole
        assert spec_of(("batch", "heads", "embed"), (8, 3, 4)) == P(("data", "fsdp"), None, None)
        laid = jax.jit(lambda x: constrained(x, "batch", None, "heads"))(x)
        assert laid.sharding.shard_shape(x.shape) == (2, 3, 2)
        with pytest.raises(ValueError, match="constrained: 2 axis names"):
            constrained(x, "batch", None)
    assert axes_of("batch") == ()


def test_axes_that_a_shard_map_took_are_no_longer_to_be_had():
    layout = make_layout({"data": 2, "tensor": 2}, {"batch": ("data",), "heads": ("tensor",)})
    seen = []

    def body(x):
        seen.append((axes_of("batch"), axes_of("heads")))
        return constrained(x, "batch", "heads")

    with entered(layout):
        jax.jit(jax.shard_map(body, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}))(jnp.zeros((4, 4)))
    assert seen == [((), ("tensor",))]


def test_the_defaults_in_a_config_are_the_defaults():
    config = base()
    assert {name: tuple(over) for name, over in config.rules.items()} == dict(DEFAULT_RULES)
    assert set(config.mesh) == set(AXES)
