"""Hyperparameters that are learned: the step size, its course over time, and the decays of a known optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import optax

from research.core.names import choose
from research.core.types import Array, Key, LearnedOptimizer, Tree
from research.optim.learned._features import TIMES, Decays, Moments, by_parameter, moved_by, offsets, time, unbiased


def _adam(g: Array, m: Moments, rates: Decays, t: Array) -> Array:
    mean, square = unbiased(m.momentum[0], rates.momentum[0], t), unbiased(m.square[0], rates.square[0], t)
    return mean / (jnp.sqrt(square) + 1e-8)


def _momentum(g: Array, m: Moments, rates: Decays, t: Array) -> Array:
    return m.momentum[0]


BASES: Mapping[str, tuple[Decays, Callable[[Array, Moments, Decays, Array], Array]]] = {
    "adam": (Decays((0.9,), (0.999,), ()), _adam),
    "momentum": (Decays((0.9,), (), ()), _momentum),
}


def learned_scales(*, base: str = "adam", learning_rate: float = 1e-3) -> LearnedOptimizer:
    """-rate(t) times the direction of `base`, with rate(t) = exp(theta["log_rate"] + theta["schedule"] . time(t)).

    A hyper-optimizer (Maclaurin et al. 2015, arXiv 1502.03492; Metz et al. 2019, arXiv 1810.10180, learn such baselines beside
    their networks). base: "adam" (Kingma and Ba 2015, algorithm 1) or "momentum", the running mean of the gradient. theta
    begins as the base itself: log_rate at that of `learning_rate`, schedule (of the 11 features of `_features.time`) and the
    offsets of the decays at 0.

    Raises ValueError: an unknown base, a learning rate that is not above 0.
    """
    decays, direction = choose(BASES, base, "learned_scales: base")
    if not learning_rate > 0:
        raise ValueError(f"learned_scales: learning_rate={learning_rate}; allowed: above 0")

    def init(key: Key) -> Tree:
        rate = jnp.full((), math.log(learning_rate))
        return {"log_rate": rate, "schedule": jnp.zeros(len(TIMES)), "decays": offsets(decays)}

    def transformation(theta: Tree) -> optax.GradientTransformation:
        def step(p: Array, g: Array, m: Moments, t: Array) -> Array:
            rate = jnp.exp(theta["log_rate"] + theta["schedule"] @ time(t))
            return -rate * direction(g, m, moved_by(decays, theta["decays"]), t)

        return by_parameter(lambda: moved_by(decays, theta["decays"]), step)

    return LearnedOptimizer(init, transformation)
