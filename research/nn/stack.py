"""Layers one after another: written out one by one, or as one `lax.scan` over stacked parameters.

Layers repeat with a period (a pattern of sliding and global attention, say), so layer i is built by `make(i % period, rngs)`.
Written out, the list holds every layer. Scanned, it holds `period` modules whose parameters have a leading axis "layers" of
length layers / period: layer i is entry i // period of module i % period. XLA then compiles one period instead of all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from research.core.types import Spec, Tree
from research.nn.functional import AXES

Make = Callable[[int, nnx.Rngs], nnx.Module]


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


def build(make: Make, layers: int, period: int, scan: bool, rngs: nnx.Rngs) -> nnx.List:
    """The layers, `layers` a multiple of `period`."""
    if not scan:
        return nnx.List([make(i % period, rngs) for i in range(layers)])
    return nnx.List([_stacked(lambda r, j=j: make(j, r), layers // period, rngs) for j in range(period)])


def run(
    blocks: nnx.List, step: Callable[..., tuple[Any, Tree]], carry: Any, xs: Tree = None, *, scan: bool, remat: bool = False
):
    """carry, y = step(block, carry, x) over all layers; (carry, ys). xs and ys are {"i": of list entry i}, stacked where
    scanned.

    remat: keep only the carry between layers for the backward pass, and compute the inside of a layer again there.
    """
    xs = {str(i): None for i in range(len(blocks))} if xs is None else xs

    def pure(graphdef, state, carry, x):
        block = nnx.merge(graphdef, state)
        carry, y = step(block, carry, x)
        return carry, y, nnx.state(block)

    if remat:
        pure = jax.checkpoint(pure, static_argnums=0)
    parts = [nnx.split(block) for block in blocks]

    def period(carry, states_and_xs):
        states, xs = states_and_xs
        ys, after = {}, []
        for i, (graphdef, _) in enumerate(parts):
            carry, ys[str(i)], state = pure(graphdef, states[i], carry, xs[str(i)])
            after.append(state)
        return carry, (ys, after)

    inputs = ([state for _, state in parts], xs)
    carry, (ys, after) = jax.lax.scan(period, carry, inputs) if scan else period(carry, inputs)
    for block, state in zip(blocks, after, strict=True):
        nnx.update(block, state)
    return carry, ys


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
