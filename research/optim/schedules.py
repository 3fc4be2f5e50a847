"""Learning-rate schedules: (peak, steps, warmup, ...) -> a function of the step, float32.

Step s counts updates from 0. Every schedule begins with a linear warmup, peak * (s + 1) / warmup for s < warmup, so the first
update is never lost; its `final` value is reached at s = `steps`, one after the last update, so neither is the last. Beyond
`steps` a schedule stays where it ended. Durations (`warmup`, `decay`, `every`) are steps where they are int and fractions of
`steps` where they are float: 100 is a hundred steps, 0.02 two percent.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from research.core.names import call_checked, choose
from research.core.types import Array

Schedule = Callable[[Any], Array]


def duration(value: int | float, steps: int, name: str) -> int:
    """`value` in steps. ValueError where it is negative, longer than `steps`, or a fraction above 1."""
    if isinstance(value, float):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} is no fraction of the steps: a float is from 0 to 1, a number of steps is an int")
        return round(value * steps)
    if not 0 <= value <= steps:
        raise ValueError(f"{name}={value} is out of range: from 0 to the {steps} steps of the run")
    return int(value)


def _warmed(peak: float, warmup: int, factor: Callable[[Array], Array]) -> Schedule:
    def schedule(step: Any) -> Array:
        s = jnp.asarray(step, jnp.float32)
        rise = (s + 1) / warmup if warmup else jnp.ones_like(s)
        return (peak * jnp.where(s < warmup, rise, factor(s))).astype(jnp.float32)

    return schedule


def _progress(s: Array, start: int, end: int) -> Array:
    """0 at `start`, 1 at `end` and after."""
    return jnp.clip((s - start) / max(end - start, 1), 0.0, 1.0)


def _fraction(final: float, name: str) -> None:
    if not 0 <= final <= 1:
        raise ValueError(f"{name}={final} is out of range: a fraction of the peak, from 0 to 1")


def constant(peak: float, steps: int, /, *, warmup: int | float = 0) -> Schedule:
    """peak."""
    return _warmed(peak, duration(warmup, steps, "schedule.warmup"), jnp.ones_like)


def linear(peak: float, steps: int, /, *, warmup: int | float = 0, final: float = 0.0) -> Schedule:
    """peak * (1 - (1 - final) t), t = (s - warmup) / (steps - warmup)."""
    start = duration(warmup, steps, "schedule.warmup")
    _fraction(final, "schedule.final")
    return _warmed(peak, start, lambda s: 1 - (1 - final) * _progress(s, start, steps))


def cosine(peak: float, steps: int, /, *, warmup: int | float = 0, final: float = 0.0) -> Schedule:
    """peak * (final + (1 - final) (1 + cos(pi t)) / 2), t = (s - warmup) / (steps - warmup): Loshchilov and Hutter 2017
    (arXiv 1608.03983, eq. 5), without restarts."""
    start = duration(warmup, steps, "schedule.warmup")
    _fraction(final, "schedule.final")
    return _warmed(peak, start, lambda s: final + (1 - final) * 0.5 * (1 + jnp.cos(math.pi * _progress(s, start, steps))))


DECAYS: Mapping[str, Callable[[Array, float], Array]] = {
    "linear": lambda t, final: 1 - (1 - final) * t,
    "sqrt": lambda t, final: 1 - (1 - final) * jnp.sqrt(t),
    "exponential": lambda t, final: jnp.power(final, t),
}


def wsd(
    peak: float,
    steps: int,
    /,
    *,
    warmup: int | float = 0,
    decay: int | float = 0.2,
    final: float = 0.0,
    shape: str = "linear",
) -> Schedule:
    """Warmup, stable, decay (Hu et al. 2024, arXiv 2404.06395, section 4): peak until s = steps - decay, then with
    t = (s - (steps - decay)) / decay, by `shape`:
        linear       peak * (1 - (1 - final) t)
        sqrt         peak * (1 - (1 - final) sqrt(t))      Haegele et al. 2024 (arXiv 2405.18392, eq. 2)
        exponential  peak * final^t                        Hu et al.; `final` above 0
    """
    start, length = duration(warmup, steps, "schedule.warmup"), duration(decay, steps, "schedule.decay")
    _fraction(final, "schedule.final")
    fall = choose(DECAYS, shape, "schedule.shape")
    if shape == "exponential" and final == 0:
        raise ValueError("schedule.final=0.0 cannot end an exponential decay: give a fraction of the peak above 0")
    if start + length > steps:
        raise ValueError(f"optimizer.schedule.warmup={start} and .decay={length} steps overlap: the run has {steps}")
    begin = steps - length
    return _warmed(peak, start, lambda s: jnp.where(s < begin, 1.0, fall(_progress(s, begin, steps), final)))


def inverse_square_root(peak: float, steps: int, /, *, warmup: int | float = 1) -> Schedule:
    """peak * sqrt(w / (s + 1)) after a warmup of w = max(warmup, 1) steps (Vaswani et al. 2017, arXiv 1706.03762, eq. 3)."""
    start = max(duration(warmup, steps, "schedule.warmup"), 1)
    return _warmed(peak, start, lambda s: jnp.sqrt(start / (s + 1)))


def stepwise(
    peak: float, steps: int, /, *, warmup: int | float = 0, every: int | float = 0.25, factor: float = 0.5
) -> Schedule:
    """peak * factor^floor(s / every)."""
    period = duration(every, steps, "schedule.every")
    if period < 1:
        raise ValueError(f"schedule.every={every} is no whole step of a run of {steps}")
    start = duration(warmup, steps, "schedule.warmup")
    return _warmed(peak, start, lambda s: jnp.power(factor, jnp.floor(s / period)))


SCHEDULES: Mapping[str, Callable[..., Schedule]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "wsd": wsd,
    "inverse_square_root": inverse_square_root,
    "stepwise": stepwise,
}


def schedule(config: Mapping[str, Any], *, peak: float, steps: int, where: str = "schedule") -> Schedule:
    """The schedule of `{"name": ..., its other keywords}`. ValueError on an unknown name or keyword."""
    given = dict(config)
    if "name" not in given:
        raise ValueError(f"{where} lacks {where}.name; allowed: {', '.join(sorted(SCHEDULES))}")
    kind = choose(SCHEDULES, given.pop("name"), f"{where}.name")
    return call_checked(functools.partial(kind, peak, steps), given, where)
