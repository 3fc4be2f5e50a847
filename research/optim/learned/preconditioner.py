"""A diagonal metric that a network predicts, so that whatever is learned, a step goes down the momentum."""

from __future__ import annotations

import math

import jax.numpy as jnp
import optax

from research.core.types import Array, Key, LearnedOptimizer, Tree
from research.optim.learned._features import (
    TIMES,
    Decays,
    Moments,
    by_parameter,
    dense,
    moved_by,
    network,
    offsets,
    spread,
    time,
    unbiased,
)

DECAYS = Decays((0.9,), (0.99, 0.999), (0.99,))


def neural_preconditioner(*, hidden: int = 8, layers: int = 1, learning_rate: float = 1e-3) -> LearnedOptimizer:
    """-exp(theta["log_rate"] + f) m / (sqrt(v) + 1e-8), with f a network's of log second moments and the time.

    m and v are Adam's moments (b1 0.9, b2 0.999, bias corrected; decays are learned). f sees, for each entry, the logarithms of
    two second moments and of its row's and column's, less that of their mean over the parameter, and time. The metric is
    positive and diagonal, learned as those of Park and Oliva 2019 (Meta-Curvature, arXiv 1902.03356) and Flennerhag et al. 2020
    (WarpGrad, arXiv 1909.00025) are, but computed from statistics, so it fits parameters of any shape. f begins at 0: theta
    begins as Adam at `learning_rate`.

    Raises ValueError: sizes below 1, a learning rate that is not above 0.
    """
    if min(hidden, layers) < 1 or not learning_rate > 0:
        raise ValueError(
            f"neural_preconditioner: hidden={hidden}, layers={layers}, learning_rate={learning_rate}; "
            "allowed: sizes from 1, a rate above 0"
        )

    def init(key: Key) -> Tree:
        sizes = [4 + len(TIMES), *[hidden] * layers, 1]
        rate = jnp.full((), math.log(learning_rate))
        return {"network": dense(key, sizes, last=0.0), "log_rate": rate, "decays": offsets(DECAYS)}

    def transformation(theta: Tree) -> optax.GradientTransformation:
        def decays() -> Decays:
            return moved_by(DECAYS, theta["decays"])

        def step(p: Array, g: Array, m: Moments, t: Array) -> Array:
            rates = decays()
            squares = [*m.square, spread(m.row[0], -1, p), spread(m.column[0], -2, p)]
            features = [jnp.log(x + 1e-12) - jnp.log(x.mean() + 1e-12) for x in squares]
            (f,) = network(theta["network"], features, time(t))
            mean, square = unbiased(m.momentum[0], rates.momentum[0], t), unbiased(m.square[1], rates.square[1], t)
            return -jnp.exp(theta["log_rate"] + f) * mean / (jnp.sqrt(square) + 1e-8)

        return by_parameter(decays, step)

    return LearnedOptimizer(init, transformation)
