"""Influence balancing: a problem whose truncated gradients point the wrong way."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from research.core.axes import replicated
from research.core.contracts import abstract_key
from research.core.types import Aux, Batch, Example, Key, Task, Variables


def influence_balancing(length: int, *, size: int = 23, positive: int = 10, start: float = 0.5) -> Task:
    """`length` steps a call of x <- A x + theta s, each losing (x_0 - 1)^2 / 2.

    Tallec and Ollivier 2017 (arXiv 1705.08209, section 5.1), as used by Vicol et al. 2021 (arXiv 2112.13835, section 5). A is
    1/2 on the diagonal and 1/2 above it, s is 1 in its first `positive` entries and -1 in the others, so theta pulls x_0 up at
    first and down in the long run: an estimate that sees a few steps has the wrong sign.

    params: {"theta": scalar}, which begins at `start`. state: {"x": float32 [size]}, which begins at 0. batch {}, Aux.weight
    None. With length=200 from the start, the gradient at 0.5 is 28.04.

    Raises ValueError: length below 1, or a number of positive entries that is not of the size.
    """
    if length < 1 or not 0 <= positive <= size:
        raise ValueError(f"influence_balancing: length={length}, positive={positive}; allowed: 1 or more, 0 to the size {size}")

    def init(key: Key) -> Variables:
        return {"params": {"theta": jnp.full((), start)}, "state": {"x": jnp.zeros(size)}, "frozen": {}}

    def loss(variables: Variables, batch: Batch, key: Key) -> tuple[jax.Array, Aux]:
        signs = jnp.where(jnp.arange(size) < positive, 1.0, -1.0)

        def step(x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            above = jnp.concatenate([x[1:], jnp.zeros_like(x[:1])])
            x = (x + above) / 2 + variables["params"]["theta"] * signs
            return x, (x[0] - 1) ** 2 / 2

        x, losses = jax.lax.scan(step, variables["state"]["x"], None, length)
        return losses.mean(), Aux({"x": x}, {}, None)

    return Task(init, loss, {}, {}, replicated(jax.eval_shape(init, abstract_key())))


def example() -> Example:
    return Example(influence_balancing(4))
