"""Layers one after another: written out one by one, as one `lax.scan` over stacked parameters, or as stages of a pipeline.

Layers repeat with a period (a pattern of sliding and global attention, say), so layer i is built by `make(i % period, rngs)`.
Written out, the list holds every layer. Scanned, it holds `period` modules whose parameters have a leading axis "layers" of
length layers / period: layer i is entry i // period of module i % period. XLA then compiles one period instead of all layers.

Where the mesh in use lays "layers" over some of its axes, the scanned layers run as `nn.pipeline` says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from research.core.mesh import axes_of
from research.core.names import choose
from research.core.types import Spec, Tree
from research.nn.functional import AXES
from research.nn.pipeline import pipelined

Make = Callable[[int, nnx.Rngs], nnx.Module]

# What a layer keeps for the backward pass, from most to least; the rest is computed again there (Chen et al. 2016,
# arXiv 1604.06174). The carry between layers is always kept.
REMAT: Mapping[str, Callable[..., Any]] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,  # results of products
    "weights": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # of products with parameters
    "full": jax.checkpoint_policies.nothing_saveable,
}


def _remembering(layer: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`layer(graphdef, …)`, of which only what REMAT[name] says is kept for the backward pass."""
    return layer if name == "none" else jax.checkpoint(layer, policy=REMAT[name], static_argnums=0)


def _stacked(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    state = jax.vmap(lambda key: nnx.state(make(nnx.Rngs(key))))(jax.random.split(rngs.params(), count))
    named = []
    for path, variable in nnx.to_flat_state(state):
        names = variable.get_metadata().get(AXES) or (None,) * (variable.ndim - 1)
        variable = variable.replace(variable.get_value())
        variable.set_metadata(**{AXES: ("layers", *names)})
        named.append((path, variable))
    return nnx.merge(graphdef, nnx.from_flat_state(named))


def pattern(layers: int, masks: int, remat: Sequence[str]) -> int:
    """After how many layers they repeat, given how many masks and which names of REMAT do. Raises ValueError, naming the
    config's key."""
    if not remat:
        raise ValueError(f"model.remat=[] must have a name or more, one a layer; allowed: {', '.join(REMAT)}")
    for name in remat:
        choose(REMAT, name, "model.remat")
    period = math.lcm(masks, len(remat))
    if layers % period:
        raise ValueError(
            f"model.layers={layers} must be a multiple of {period}, after which {masks} masks of model.attention.mask and "
            f"{len(remat)} names of model.remat repeat"
        )
    return period


def build(make: Make, layers: int, period: int, scan: bool, rngs: nnx.Rngs) -> nnx.List:
    """The layers, `layers` a multiple of `period`."""
    if not scan:
        return nnx.List([make(i % period, rngs) for i in range(layers)])
    return nnx.List([_stacked(lambda r, j=j: make(j, r), layers // period, rngs) for j in range(period)])


def run(
    blocks: nnx.List,
    step: Callable[..., tuple[Any, Tree]],
    carry: Any,
    xs: Tree = None,
    *,
    scan: bool,
    remat: Sequence[str] = ("none",),
):
    """carry, y = step(block, carry, x) over all layers; (carry, ys). xs and ys are {"i": of list entry i}, stacked where
    scanned.

    remat: names of REMAT, one a list entry, repeated.

    Without xs, and under a mesh that lays "layers" over its axes, the layers are a pipeline: every leaf of the carry begins
    with the batch, and random numbers differ by layer and microbatch. Raises ValueError (one line) where they cannot be one:
    not scanned, with a y, or with state that a pass updates. With xs (a cache) each layer waits for the one before.
    """
    if axes_of("layers") and xs is None:
        return _pipelined(blocks, step, carry, scan, remat)
    xs = {str(i): None for i in range(len(blocks))} if xs is None else xs

    def pure(graphdef, state, carry, x):
        block = nnx.merge(graphdef, state)
        carry, y = step(block, carry, x)
        return carry, y, nnx.state(block)

    parts = [nnx.split(block) for block in blocks]
    layers = [_remembering(pure, remat[i % len(remat)]) for i in range(len(parts))]

    def period(carry, states_and_xs):
        states, xs = states_and_xs
        ys, after = {}, []
        for i, (graphdef, _) in enumerate(parts):
            carry, ys[str(i)], state = layers[i](graphdef, states[i], carry, xs[str(i)])
            after.append(state)
        return carry, (ys, after)

    inputs = ([state for _, state in parts], xs)
    carry, (ys, after) = jax.lax.scan(period, carry, inputs) if scan else period(carry, inputs)
    for block, state in zip(blocks, after, strict=True):
        nnx.update(block, state)
    return carry, ys


def _pipelined(
    blocks: nnx.List, step: Callable[..., tuple[Any, Tree]], carry: Any, scan: bool, remat: Sequence[str]
) -> tuple[Any, Tree]:
    """`run` as stages of a pipeline."""
    if not scan:
        raise ValueError(
            "model.scan_layers=False under mesh.pipeline above 1: layers written out have no stages; allowed: True"
        )
    parts = [nnx.split(block, nnx.filterlib.Any(nnx.Param, nnx.RngState), ...) for block in blocks]
    for _, _, updated in parts:
        for path, _ in nnx.to_flat_state(updated):
            raise ValueError(
                f"mesh.pipeline above 1: {'/'.join(map(str, path))} of a layer is state, which each microbatch would update; "
                "allowed: layers of parameters and dropout"
            )

    def layer(graphdef, state, carry):
        carry, y = step(nnx.merge(graphdef, state, {}), carry, None)
        if jax.tree.leaves(y):
            raise ValueError("mesh.pipeline above 1: layers give outputs beside the carry; allowed: None")
        return carry

    of_entry = [_remembering(layer, remat[i % len(remat)]) for i in range(len(parts))]

    def layers(states, carry, microbatch):
        def period(carry, states):
            for layer, (graphdef, *_), state in zip(of_entry, parts, states, strict=True):
                carry = layer(graphdef, state, carry)
            return carry, None

        return jax.lax.scan(period, carry, _drawing_anew(states, microbatch))[0]

    states = [state for _, state, _ in parts]
    carry = pipelined(layers, states, carry)
    for block, state in zip(blocks, _drawing_anew(states, 2**31 - 1), strict=True):
        nnx.update(block, state)
    return carry, {str(i): None for i in range(len(blocks))}


def _drawing_anew(states: Tree, number: jax.Array | int) -> Tree:
    """The states, every generator's keys (one a layer) folded with `number`."""

    def one(x: jax.Array) -> jax.Array:
        is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.vmap(jax.random.fold_in, (0, None))(x, number) if is_key else x

    return jax.tree.map(one, states)


def cache_specs(blocks: nnx.List, one: Callable[[nnx.Module], Tree], layers: int, scan: bool) -> dict[str, Tree]:
    """`one(block)`, Specs, for every entry of the list, with the axis "layers" in front where they are scanned."""
    count = layers // len(blocks)

    def lifted(spec: Spec) -> Spec:
        return Spec((count, *spec.shape), spec.dtype, ("layers", *spec.axes)) if scan else spec

    return {str(i): jax.tree.map(lifted, one(block)) for i, block in enumerate(blocks)}


def stack_layers(blocks: dict[str, Tree], period: int) -> dict[str, Tree]:
    """The variables of written-out layers, {"0": ..., "1": ...}, as those of the scanned form."""
    groups = [[blocks[str(i)] for i in range(j, len(blocks), period)] for j in range(period)]
    return {str(j): jax.tree.map(lambda *leaves: jnp.stack(leaves), *group) for j, group in enumerate(groups)}


def unstack_layers(blocks: dict[str, Tree]) -> dict[str, Tree]:
    """The inverse of `stack_layers`."""
    period = len(blocks)
    count = jax.tree.leaves(blocks)[0].shape[0]
    return {str(i): jax.tree.map(lambda leaf, i=i: leaf[i // period], blocks[str(i % period)]) for i in range(count * period)}
