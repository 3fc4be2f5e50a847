"""Evolution strategies: how a search distribution over vectors moves by the losses of its samples alone.

Each is a `Strategy` of pure functions on vectors float32 [d]; losses are minimized, and one that is NaN counts as the worst.
`research.learners.evolution` runs one over the params of a task.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.core.types import Array, Key, Tree


class Strategy(NamedTuple):
    """init: mean [d] -> search, a dict of arrays with "mean" [d]. ask: (search, key) -> samples [n, d]. tell: (search, samples
    [n, d], losses [n]) -> search."""

    n: int
    init: Callable[[Array], Tree]
    ask: Callable[[Tree, Key], Array]
    tell: Callable[[Tree, Array, Array], Tree]


def _check(n: int, sigma: float, who: str) -> None:
    if n < 2:
        raise ValueError(f"{who}: n={n}; allowed: 2 or more")
    if not sigma > 0:
        raise ValueError(f"{who}: sigma={sigma}; allowed: above 0")


def _ranks(losses: Array) -> Array:
    """0 for the smallest loss, n - 1 for the largest or NaN; ties in order."""
    order = jnp.argsort(losses)  # NaN last
    return jnp.zeros_like(order).at[order].set(jnp.arange(losses.shape[0]))


def _row(x: Array) -> Array:
    return x[None, :]


def open_es(n: int, sigma: float, tx: optax.GradientTransformation) -> Strategy:
    """Antithetic pairs around the mean and centered ranks (Salimans et al. 2017, arXiv 1703.03864, section 2): the mean moves
    by `tx` along sum_i rank_i z_i / (n sigma), rank from -1/2 of the best to 1/2, z of unit variance.

    n: samples, an even number. sigma: standard deviation, constant. search: "mean", "opt" (of tx).
    """
    _check(n, sigma, "open_es")
    if n % 2:
        raise ValueError(f"open_es: n={n}; allowed: an even number, samples are in pairs")

    def init(mean: Array) -> Tree:
        return {"mean": mean, "opt": tx.init(mean)}

    def ask(search: Tree, key: Key) -> Array:
        z = jax.random.normal(key, (n // 2, search["mean"].size), search["mean"].dtype)
        return _row(search["mean"]) + sigma * jnp.concatenate([z, -z])

    def tell(search: Tree, samples: Array, losses: Array) -> Tree:
        mean = search["mean"]
        shaped = (_ranks(losses) / (n - 1) - 0.5).astype(mean.dtype)
        # pairs share their mean, so the samples need not be centered
        gradient = (shaped[: n // 2] - shaped[n // 2 :]) @ (samples[: n // 2] - samples[n // 2 :]) / (2 * n * sigma**2)
        updates, opt = tx.update(gradient, search["opt"], mean)
        return {"mean": optax.apply_updates(mean, updates), "opt": opt}

    return Strategy(n, init, ask, tell)


class _Recombination(NamedTuple):
    """Constants of CMA-ES for n samples of d dimensions (Hansen 2016, table 1)."""

    weights: np.ndarray
    mu_eff: float
    c_c: float
    c_1: float
    c_mu: float
    c_sigma: float
    d_sigma: float
    chi: float


def _recombination(n: int, d: int) -> _Recombination:
    raw = math.log((n + 1) / 2) - np.log(np.arange(1, n + 1))
    best = raw[: n // 2]
    mu_eff = best.sum() ** 2 / (best**2).sum()
    rest = raw[n // 2 :]
    mu_eff_rest = rest.sum() ** 2 / (rest**2).sum() if (rest**2).sum() else 0.0
    c_c = (4 + mu_eff / d) / (d + 4 + 2 * mu_eff / d)
    c_1 = 2 / ((d + 1.3) ** 2 + mu_eff)
    c_mu = min(1 - c_1 - 1e-8, 2 * (mu_eff + 1 / mu_eff - 2) / ((d + 2) ** 2 + mu_eff))
    c_sigma = (mu_eff + 2) / (d + mu_eff + 5)
    d_sigma = 1 + 2 * max(0.0, math.sqrt((mu_eff - 1) / (d + 1)) - 1) + c_sigma
    least = min(1 + c_1 / c_mu, 1 + 2 * mu_eff_rest / (mu_eff + 2), (1 - c_1 - c_mu) / (d * c_mu)) if c_mu else 0.0
    positive, negative = raw[raw > 0].sum(), -raw[raw < 0].sum()
    weights = np.where(raw >= 0, raw / positive, least * raw / negative if negative else 0.0)
    chi = math.sqrt(d) * (1 - 1 / (4 * d) + 1 / (21 * d**2))
    return _Recombination(weights, mu_eff, c_c, c_1, c_mu, c_sigma, d_sigma, chi)


def cma_es(n: int, sigma: float) -> Strategy:
    """CMA-ES with negative weights (Hansen 2016, arXiv 1604.00772, figure 6): mean, step size and full covariance [d, d].

    n: samples; 4 + 3 log d is usual. sigma: first standard deviation. search: "mean", "sigma", "path_sigma", "path_c" [d],
    "covariance" [d, d], its square root's "basis" [d, d] and "scales" [d], "count". An eigendecomposition a step: d up to some
    thousands.
    """
    _check(n, sigma, "cma_es")

    def init(mean: Array) -> Tree:
        d, dtype = mean.size, mean.dtype
        zeros, eye = jnp.zeros(d, dtype), jnp.eye(d, dtype=dtype)
        return {
            "mean": mean, "sigma": jnp.asarray(sigma, dtype), "path_sigma": zeros, "path_c": zeros, "covariance": eye,
            "basis": eye, "scales": jnp.ones(d, dtype), "count": jnp.int32(0),
        }  # fmt: skip

    def ask(search: Tree, key: Key) -> Array:
        z = jax.random.normal(key, (n, search["mean"].size), search["mean"].dtype)
        return _row(search["mean"]) + search["sigma"] * (z * _row(search["scales"])) @ search["basis"].T

    def tell(search: Tree, samples: Array, losses: Array) -> Tree:
        mean, basis, scales = search["mean"], search["basis"], search["scales"]
        d, dtype = mean.size, mean.dtype
        own = _recombination(n, d)
        w = jnp.asarray(own.weights, dtype)[_ranks(losses)]
        y = (samples - _row(mean)) / search["sigma"]
        white = (y @ basis) / _row(scales)  # of length |C^-1/2 y|
        step = jnp.maximum(w, 0) @ y
        count = search["count"] + 1

        damp = math.sqrt(own.c_sigma * (2 - own.c_sigma) * own.mu_eff)
        path_sigma = (1 - own.c_sigma) * search["path_sigma"] + damp * (basis @ (jnp.maximum(w, 0) @ white))
        length = jnp.linalg.norm(path_sigma)
        sigma = search["sigma"] * jnp.exp(own.c_sigma / own.d_sigma * (length / own.chi - 1))
        expected = jnp.sqrt(1 - (1 - own.c_sigma) ** (2 * (count + 1)).astype(dtype))
        going = (length / expected < (1.4 + 2 / (d + 1)) * own.chi).astype(dtype)
        path_c = (1 - own.c_c) * search["path_c"] + going * math.sqrt(own.c_c * (2 - own.c_c) * own.mu_eff) * step

        lengths = jnp.maximum((white**2).sum(1), 1e-8)
        rank_mu = (y * (w * jnp.where(w >= 0, 1, d / lengths))[:, None]).T @ y
        keep = 1 - own.c_1 - own.c_mu * own.weights.sum() + own.c_1 * (1 - going) * own.c_c * (2 - own.c_c)
        covariance = keep * search["covariance"] + own.c_1 * jnp.outer(path_c, path_c) + own.c_mu * rank_mu
        covariance = (covariance + covariance.T) / 2
        values, basis = jnp.linalg.eigh(covariance)
        values = jnp.maximum(values, jnp.finfo(dtype).eps * values[-1])  # below is rounding
        return {
            "mean": mean + search["sigma"] * step, "sigma": sigma, "path_sigma": path_sigma, "path_c": path_c,
            "covariance": covariance, "basis": basis, "scales": jnp.sqrt(values), "count": count,
        }  # fmt: skip

    return Strategy(n, init, ask, tell)


def snes(n: int, sigma: float, rate: float | None = None) -> Strategy:
    """Separable natural evolution strategy (Wierstra et al. 2014, JMLR 15, algorithm 6 with the utilities of section 3.1): a
    standard deviation a coordinate.

    n: samples. sigma: first standard deviation. rate: of the deviations, (3 + log d) / (5 sqrt(d)) where None; the mean's is 1.
    search: "mean", "sigma" [d].
    """
    _check(n, sigma, "snes")
    raw = np.maximum(0.0, math.log(n / 2 + 1) - np.log(np.arange(1, n + 1)))
    utilities = raw / raw.sum() - 1 / n

    def init(mean: Array) -> Tree:
        return {"mean": mean, "sigma": jnp.full_like(mean, sigma)}

    def ask(search: Tree, key: Key) -> Array:
        z = jax.random.normal(key, (n, search["mean"].size), search["mean"].dtype)
        return _row(search["mean"]) + _row(search["sigma"]) * z

    def tell(search: Tree, samples: Array, losses: Array) -> Tree:
        mean, deviation = search["mean"], search["sigma"]
        z = (samples - _row(mean)) / _row(deviation)
        u = jnp.asarray(utilities, mean.dtype)[_ranks(losses)]
        own = (3 + math.log(mean.size)) / (5 * math.sqrt(mean.size)) if rate is None else rate
        return {"mean": mean + deviation * (u @ z), "sigma": deviation * jnp.exp(0.5 * own * (u @ (z**2 - 1)))}

    return Strategy(n, init, ask, tell)


STRATEGIES: dict[str, Callable[..., Any]] = {"open_es": open_es, "cma_es": cma_es, "snes": snes}
