"""A small MLP that sees each parameter's own statistics."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from research.core.types import Array, Key, LearnedOptimizer, Tree
from research.optim.learned._features import (
    TIMES,
    Decays,
    Moments,
    by_parameter,
    dense,
    factors,
    moved_by,
    network,
    offsets,
    spread,
    time,
    unbiased,
    unit,
)

DECAYS = Decays((0.9, 0.99, 0.999), (0.999,), (0.9, 0.99, 0.999))


def per_parameter_mlp(
    *,
    hidden: int = 4,
    layers: int = 2,
    step: float = 1e-3,
    exponent: float = 1e-3,
    nominal: float = 0.0,
    output: float = 1.0,
) -> LearnedOptimizer:
    """-step * a * exp(exponent * b), with (a, b) an MLP's of 39 features of the parameter, each entry on its own.

    Metz et al. 2022, "Practical tradeoffs between memory, compute, and performance in learned optimizers" (arXiv 2203.11860),
    their small_fc_lopt. The features: gradient and parameter; momenta of three decays, as they are, over the root of the second
    moment, and by Adafactor's factors; the second moment and its inverse root; the gradient by Adafactor's factors; their rows
    and columns, and inverse roots; and 11 of the time. All but the last are divided by their root mean square over the
    parameter. theta: {"network", "decays", "rate"}, the decays moving from the published ones as log(1 - decay); 209 numbers as
    it is, 197 of them the paper's.

    nominal: the learning rate of a term of Adam's direction that is added to the network's, times exp(10 * (1, time) .
    theta["rate"]), which begins as 1. Harrison et al. 2022 (arXiv 2209.11208) find such a term to steady what is learned; 0 for
    none, as in the paper. output: what the last layer's first weights are multiplied by; at 0 theta begins as that term alone.

    Raises ValueError: sizes below 1, a scale that is not above 0, a negative nominal rate.
    """
    if min(hidden, layers) < 1 or not step > 0 or not exponent > 0 or not nominal >= 0:
        raise ValueError(
            f"per_parameter_mlp: hidden={hidden}, layers={layers}, step={step}, exponent={exponent}, nominal={nominal}; "
            "allowed: sizes from 1, scales above 0, a nominal rate of 0 or more"
        )

    def init(key: Key) -> Tree:
        sizes = [28 + len(TIMES), *[hidden] * layers, 2]
        return {"network": dense(key, sizes, output), "decays": offsets(DECAYS), "rate": jnp.zeros(1 + len(TIMES))}

    def transformation(theta: Tree) -> optax.GradientTransformation:
        def decays() -> Decays:
            return moved_by(DECAYS, theta["decays"])

        def move(p: Array, g: Array, m: Moments, t: Array) -> Array:
            features = [unit(f) for f in _features(p, g, m)]
            direction, magnitude = network(theta["network"], features, time(t))
            learned = step * direction * jnp.exp(exponent * magnitude)
            rates = decays()
            mean, square = unbiased(m.momentum[0], rates.momentum[0], t), unbiased(m.square[0], rates.square[0], t)
            rate = nominal * jnp.exp(10 * (theta["rate"][0] + theta["rate"][1:] @ time(t)))
            return -learned - rate * mean / (jnp.sqrt(square) + 1e-8)

        return by_parameter(decays, move)

    return LearnedOptimizer(init, transformation)


def _features(p: Array, g: Array, m: Moments) -> list[Array]:
    """The 28 of an entry that are not the time."""
    inverse = jax.lax.rsqrt(m.square[0] + 1e-6)
    rows = [spread(row, -1, p) for row in m.row]
    columns = [spread(column, -2, p) for column in m.column]
    by = [factors(row, column, p) for row, column in zip(m.row, m.column, strict=True)]
    return [
        g,
        p,
        *m.momentum,
        m.square[0],
        *(x * inverse for x in m.momentum),
        inverse,
        *(g * f for f in by),
        *rows,
        *columns,
        *(jax.lax.rsqrt(x + 1e-8) for x in (*rows, *columns)),
        *(x * f for x, f in zip(m.momentum, by, strict=True)),
    ]
