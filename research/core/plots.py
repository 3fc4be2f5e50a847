"""Curves as inline SVG: a string of HTML a panel, coloured by CSS variables, so it is at home on a light and a dark page."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from research.core.progress import short

WIDTH, HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 10, 8, 26
_POINTS = 500  # drawn at most, a curve
_ORDER = ("train", "val", "test")


class Curve(NamedTuple):
    """steps int [n], values float [n], or [n, members]: then the mean is a line, and the members are bands around it."""

    label: str
    steps: np.ndarray
    values: np.ndarray


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2, 5 times a power of ten) within [low, high]."""
    raw = (high - low) / max(count, 1)
    if not raw > 0 or not math.isfinite(raw):
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high], thinned to about six; with 2 and 5 times them where there are fewer than three."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    tens = [10.0**k for k in powers if low <= 10.0**k <= high]
    if len(tens) >= 3:
        return tens[:: math.ceil(len(tens) / 6)]
    return [m * 10.0**k for k in powers for m in (1, 2, 5) if low <= m * 10.0**k <= high]


def thinned(curve: Curve, points: int = _POINTS) -> Curve:
    """At most `points` of a curve: the mean over runs of neighbours, their last step; NaN only where all of a run is NaN."""
    n = len(curve.steps)
    if n <= points:
        return curve
    edges = np.linspace(0, n, points + 1).astype(int)
    means = []
    for a, b in zip(edges[:-1], edges[1:]):
        part, finite = curve.values[a:b], np.isfinite(curve.values[a:b])
        count = finite.sum(0)
        means.append(np.where(count, np.where(finite, part, 0).sum(0) / np.maximum(count, 1), np.nan))
    return Curve(curve.label, curve.steps[edges[1:] - 1], np.stack(means))


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the members that are finite; NaN where none is."""
    if values.ndim == 1:
        return values
    finite = np.isfinite(values)
    return np.where(finite.any(1), np.where(finite, values, 0).sum(1) / np.maximum(finite.sum(1), 1), np.nan)


def _quantiles(values: np.ndarray, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    rows = [row[np.isfinite(row)] for row in values]
    pairs = [np.quantile(row, [low, high]) if len(row) else (np.nan, np.nan) for row in rows]
    return np.asarray([a for a, _ in pairs]), np.asarray([b for _, b in pairs])


class _Frame(NamedTuple):
    """From data to the units of the drawing."""

    x: tuple[float, float]
    y: tuple[float, float]
    log: bool

    def px(self, step: float) -> float:
        return _LEFT + (step - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - _LEFT - _RIGHT)

    def py(self, value: float) -> float:
        low, high, at = (math.log10(v) for v in (*self.y, max(value, self.y[0]))) if self.log else (*self.y, value)
        return HEIGHT - _BOTTOM - (at - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)


def _frame(curves: Sequence[Curve]) -> _Frame:
    every = np.concatenate([c.values[np.isfinite(c.values)].ravel() for c in curves])
    steps = np.concatenate([c.steps for c in curves])
    low, high = float(every.min()), float(every.max())
    log = low > 0 and high / low > 30
    pad = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    y = (low / 1.08, high * 1.08) if log else (low - pad, high + pad)
    first, last = float(steps.min()), float(steps.max())
    return _Frame((min(first, 0.0) if last else 0.0, last if last > min(first, 0.0) else first + 1.0), y, log)


def _runs(ys: Sequence[np.ndarray]) -> list[list[int]]:
    """Indices of the stretches in which all of `ys` are finite."""
    runs: list[list[int]] = [[]]
    for i in range(len(ys[0])):
        if all(np.isfinite(y[i]) for y in ys):
            runs[-1].append(i)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _drawn(curve: Curve, colour: str, frame: _Frame) -> str:
    def at(step: float, value: float) -> str:
        return f"{frame.px(step):.1f},{frame.py(value):.1f}"

    parts = []
    if curve.values.ndim == 2:
        for low, high, opacity in ((0.0, 1.0, 0.14), (0.25, 0.75, 0.22)):
            a, b = _quantiles(curve.values, low, high)
            for run in _runs((a, b)):
                edge = [at(curve.steps[i], b[i]) for i in run] + [at(curve.steps[i], a[i]) for i in reversed(run)]
                parts.append(f'<polygon points="{" ".join(edge)}" fill="{colour}" opacity="{opacity}"/>')
    mean = _mean(curve.values)
    for run in _runs((mean,)):
        points = " ".join(at(curve.steps[i], mean[i]) for i in run)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
        if len(run) == 1 or len(curve.steps) <= 20:
            marks = [at(curve.steps[i], mean[i]).split(",") for i in run]
            parts += [f'<circle cx="{x}" cy="{y}" r="2.2" fill="{colour}"/>' for x, y in marks]
    return "".join(parts)


def _axes(frame: _Frame) -> str:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    parts = []
    for value in log_ticks(*frame.y) if frame.log else ticks(*frame.y):
        y = frame.py(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{short(value)}</text>')
    for step in ticks(*frame.x, count=4):
        x = frame.px(step)
        anchor = "end" if x > right - 14 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="{anchor}">{short(step)}</text>')
    return "".join(parts)


def panel(title: str, curves: Sequence[Curve]) -> str:
    """One panel of curves, with a legend that says the last value of each, or the value under the pointer. "" where no value is
    finite. Colours follow the labels: "train", "val" and "test" have their own everywhere."""
    curves = [thinned(c) for c in curves if np.isfinite(c.values).any()]
    if not curves:
        return ""
    frame, drawn, legend, data = _frame(curves), [], [], []
    free = len(_ORDER)
    for curve in curves:
        number = _ORDER.index(curve.label) if curve.label in _ORDER else free
        free += curve.label not in _ORDER
        colour = f"var(--c{number % 8})"
        drawn.append(_drawn(curve, colour, frame))
        mean = _mean(curve.values)
        last = mean[np.isfinite(mean)][-1]
        legend.append(f'<span><i style="background:{colour}"></i>{html.escape(curve.label)} <b>{short(last)}</b></span>')
        data.append({"x": curve.steps.tolist(), "y": [float(f"{v:.5g}") if math.isfinite(v) else None for v in mean]})
    hover = {"x": frame.x, "left": _LEFT, "right": WIDTH - _RIGHT, "curves": data}
    scale = '<span class="scale">log</span>' if frame.log else ""
    members = next((c.values.shape[1] for c in curves if c.values.ndim == 2), 0)
    bands = f'<span class="scale">{members} members: mean, quartiles, range</span>' if members else ""
    return (
        f'<figure class="panel" data-curves="{html.escape(json.dumps(hover))}">'
        f"<figcaption><h3>{html.escape(title)}</h3>{scale}{bands}"
        f'<div class="legend">{"".join(legend)}<span class="at"></span></div></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">{_axes(frame)}'
        f'<line class="cursor" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>{"".join(drawn)}</svg></figure>'
    )


def panels(series: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> list[str]:
    """Every series of a run: "train/loss" and "val/loss" share the panel "loss", "train/grad_norm/embed" and
    "train/grad_norm/mlp" the panel "grad_norm". Those that were evaluated come first, "loss" before all."""
    grouped: dict[str, list[Curve]] = {}
    for name, (steps, values) in series.items():
        prefix, _, rest = name.partition("/")
        base, _, part = rest.partition("/")
        if values.ndim <= 2 and len(steps) > 1:  # what was found once is a number, not a curve
            label = f"{prefix} {part}" if part else prefix
            grouped.setdefault(base or prefix, []).append(Curve(label, steps, values))
    rank = {label: i for i, label in enumerate(_ORDER)}

    def order(item: tuple[str, list[Curve]]) -> tuple[bool, bool, str]:
        return item[0] != "loss", all(c.label.split(" ")[0] == "train" for c in item[1]), item[0]

    ordered = sorted(grouped.items(), key=order)
    made = [panel(base, sorted(curves, key=lambda c: (rank.get(c.label, len(rank)), c.label))) for base, curves in ordered]
    return [text for text in made if text]
