"""Noise-reuse evolution strategies: one perturbation for a whole episode."""

from __future__ import annotations

from research.core.types import Array, Estimate, Example, Tree
from research.estimates._example import leaking_state
from research.estimates._online import online
from research.estimates._particles import Horizon, where


def noise_reuse(sigma: float, pairs: int, horizon: Horizon, *, staggered: bool = True) -> Estimate:
    """Li et al. 2023, "Variance-Reduced Gradient Estimation via Noise-Reuse in Online Evolution Strategies" (arXiv 2304.12180),
    NRES, with antithetic pairs.

    As `pes`, but a pair draws e ~ N(0, sigma^2) when its episode begins and keeps it to the end: the gradient is the mean over
    pairs of (L+ - L-) e / (2 sigma^2). It is unbiased for the gradient of the episode's smoothed loss as `pes` is, with one
    smoothing for all of it and no variance from the number of truncations.

    horizon, staggered: as in `truncated`. Memory, loss, Aux, the axis "particles" and the cost: see `_online.online`.

    Raises ValueError: sigma not above 0, pairs below 1, a horizon below 1 or with its ends the wrong way round.
    """

    def rule(kept: Tree, drawn: Tree, begins: Array) -> tuple[Tree, Tree]:
        now = where(begins, drawn, kept)
        return now, now

    return online("noise_reuse", rule, sigma, pairs, horizon, staggered)


def example() -> Example:
    return Example(
        noise_reuse(0.1, 4, (2, 4)), leaking_state(), exact_gradient=False, why="it is estimated from random perturbations"
    )
