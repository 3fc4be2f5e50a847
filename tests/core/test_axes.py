"""Axes of optimizer states and memories follow the variables they belong to, and are dropped where that is not certain."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest

from research.core.axes import axes_like, replicated, stacked
from research.core.tree import joined, leaves_with_paths

P = jax.P
VARIABLES = {
    "params": {
        "mlp": {"up": jnp.zeros((16, 32)), "square": jnp.zeros((16, 16)), "bias": jnp.zeros(32)},
        "deep": {"mlp": {"up": jnp.zeros((3, 16, 32))}},
    },
    "state": {"mlp": {"mean": jnp.zeros(16)}},
    "frozen": {"mlp": {"up": jnp.zeros((16, 32))}},
}
AXES = {
    "params": {
        "mlp": {"up": P("embed", "mlp"), "square": P("heads", "embed"), "bias": P("mlp")},
        "deep": {"mlp": {"up": P("layers", "embed", "mlp")}},
    },
    "state": {"mlp": {"mean": P("embed")}},
    "frozen": {"mlp": {"up": P(None, "mlp")}},
}


def by_path(tree, axes):
    return {
        joined(p): (tuple(x.shape), a) for (p, x), (_, a) in zip(leaves_with_paths(tree), leaves_with_paths(axes), strict=True)
    }


def named(tree):
    return by_path(tree, axes_like(tree, VARIABLES, AXES))


def test_moments_take_the_axes_of_their_params():
    found = named(optax.adamw(1e-3).init(VARIABLES["params"]))
    assert found["0/mu/mlp/square"] == ((16, 16), P("heads", "embed"))
    assert found["0/nu/mlp/bias"] == ((32,), P("mlp"))
    assert found["0/count"] == ((), P())


def test_the_longest_path_decides():
    found = named({"mu": VARIABLES["params"]})
    assert found["mu/deep/mlp/up"] == ((3, 16, 32), P("layers", "embed", "mlp"))


def test_leading_dimensions_of_particles_stay_unnamed():
    found = named({"pos": {"params": {"mlp": {"up": jnp.zeros((5, 16, 32))}}, "state": {"mlp": {"mean": jnp.zeros((5, 16))}}}})
    assert found["pos/params/mlp/up"][1] == P(None, "embed", "mlp")
    assert found["pos/state/mlp/mean"][1] == P(None, "embed")


def test_a_path_with_its_group_tells_params_from_frozen_and_without_it_only_what_both_agree_on_is_kept():
    found = named({"frozen": {"mlp": {"up": jnp.zeros((16, 32))}}, "mu": {"mlp": {"up": jnp.zeros((16, 32))}}})
    assert found["frozen/mlp/up"][1] == P(None, "mlp")
    assert found["mu/mlp/up"][1] == P(None, "mlp")


def test_factored_moments_lose_the_name_of_the_dimension_they_lost():
    tx = optax.adafactor(1e-3, min_dim_size_to_factor=8)
    variables = {"params": VARIABLES["params"], "state": {}, "frozen": {}}
    axes = {"params": AXES["params"], "state": {}, "frozen": {}}
    state = tx.init(variables["params"])
    found = by_path(state, axes_like(state, variables, axes))
    up = {
        shape: names
        for path, (shape, names) in found.items()
        if path.endswith("/mlp/up") and "deep" not in path and len(shape) == 1
    }
    assert up[(16,)] == P("embed") and up[(32,)] == P("mlp")
    deep = {shape: names for path, (shape, names) in found.items() if path.endswith("deep/mlp/up") and len(shape) == 2}
    assert deep[(3, 16)] == P("layers", "embed") and deep[(3, 32)] == P("layers", "mlp")


def test_a_factored_square_matrix_is_ambiguous_and_left_whole():
    found = named({"v_row": {"mlp": {"square": jnp.zeros(16)}}, "v": {"mlp": {"square": jnp.zeros((16, 16))}}})
    assert found["v_row/mlp/square"][1] == P(None)
    assert found["v/mlp/square"][1] == P("heads", "embed")


def test_of_an_ambiguous_factored_array_the_certain_names_are_kept():
    variables = {"params": {"w": jnp.zeros((4, 16, 16))}, "state": {}, "frozen": {}}
    axes = {"params": {"w": P("layers", "heads", "embed")}, "state": {}, "frozen": {}}
    assert axes_like({"row": {"w": jnp.zeros((4, 16))}}, variables, axes) == {"row": {"w": P("layers", None)}}


@pytest.mark.parametrize("path, shape", [("elsewhere", (16, 32)), ("up", (16, 32)), ("mlp/up", (7, 7)), ("mlp/bias", ())])
def test_what_belongs_to_no_variable_is_replicated(path, shape):
    tree = jnp.zeros(shape)
    for name in reversed(path.split("/")):
        tree = {name: tree}
    assert jax.tree.leaves(axes_like({"x": tree}, VARIABLES, AXES)) == [P()]


def test_a_statistic_of_a_dimension_takes_the_names_of_the_dimensions_that_it_has():
    found = named(
        {"left": {"params": {"mlp": {"up": jnp.zeros((16, 16))}}}, "right": {"deep": {"mlp": {"up": jnp.zeros((3, 32, 32))}}}}
    )
    assert found["left/params/mlp/up"][1] == P("embed", None)
    assert found["right/deep/mlp/up"][1] == P("layers", None, "mlp")


def test_axes_shorter_than_the_rank_count_as_unnamed():
    variables = {"params": {"w": jnp.zeros((4, 5))}, "state": {}, "frozen": {}}
    axes = {"params": {"w": P("embed")}, "state": {}, "frozen": {}}
    assert axes_like({"mu": {"w": jnp.zeros((2, 4, 5))}}, variables, axes) == {"mu": {"w": P(None, "embed", None)}}


def test_the_containers_of_the_tree_are_kept():
    state = optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(VARIABLES["params"])
    assert jax.tree.structure(axes_like(state, VARIABLES, AXES)) == jax.tree.structure(state)
    assert jax.tree.structure(replicated(state)) == jax.tree.structure(state)
    assert set(jax.tree.leaves(replicated(state))) == {P()}


def test_stacked_maps_what_starts_with_population_alone():
    axes = {"step": P(), "params": {"w": P("population", "embed")}, "frozen": {"w": P("embed", "population")}}
    assert stacked(axes) == {"step": None, "params": {"w": 0}, "frozen": {"w": None}}
    lanes = stacked(axes)
    tree = {"step": jnp.int32(1), "params": {"w": jnp.ones((3, 2))}, "frozen": {"w": jnp.ones((2, 3))}}
    out = jax.vmap(lambda t: t["params"]["w"].sum() + t["frozen"]["w"].sum(), (lanes,))(tree)
    assert out.shape == (3,)
