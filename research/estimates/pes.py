"""Persistent evolution strategies: unbiased gradients of long episodes from short truncations."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from research.core.types import Array, Estimate, Example, Tree
from research.estimates._example import leaking_state
from research.estimates._online import online
from research.estimates._particles import Horizon, where


def pes(sigma: float, pairs: int, horizon: Horizon, *, staggered: bool = True) -> Estimate:
    """Vicol et al. 2021, "Unbiased Gradient Estimation in Unrolled Computation Graphs with Persistent Evolution Strategies"
    (arXiv 2112.13835), algorithm 2, with antithetic pairs.

    Each particle keeps its own state and, as long as its episode lasts, the sum xi of all perturbations that it has met. In
    each call it meets a new one, e ~ N(0, sigma^2): its loss is at params + e (and params - e, for the other of the pair), and
    the gradient is the mean over pairs of (L+ - L-) xi / (2 sigma^2). So a loss is credited to every perturbation that led to
    it, and averaged over an episode the estimate is unbiased for the gradient of the smoothed loss of all of it, to which
    truncation adds variance and no bias; variance grows with the calls an episode lasts.

    horizon, staggered: as in `truncated`. Memory, loss, Aux, the axis "particles" and the cost: see `_online.online`.

    Raises ValueError: sigma not above 0, pairs below 1, a horizon below 1 or with its ends the wrong way round.
    """

    def rule(kept: Tree, drawn: Tree, begins: Array) -> tuple[Tree, Tree]:
        before = where(begins, jax.tree.map(jnp.zeros_like, kept), kept)
        return drawn, jax.tree.map(jnp.add, before, drawn)

    return online("pes", rule, sigma, pairs, horizon, staggered)


def example() -> Example:
    return Example(pes(0.1, 4, 3), leaking_state(), exact_gradient=False, why="it is estimated from random perturbations")
