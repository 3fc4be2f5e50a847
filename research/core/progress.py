"""A live view of a run: a bar in a terminal, a line in place in a notebook, plain lines anywhere else."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from research.core.hooks import Hook
from research.core.types import Learner

MODES = ("auto", "bar", "notebook", "lines")
SIZES = (1024, 2048, 4096, 8192)  # of the matrices whose products are timed


def measured_matmul_peak(dtype: Any = jnp.float32) -> float:
    """FLOP/s of one device on square matrix products of `dtype` accumulated in float32, measured for about half a second once a
    process: the best of several timings, each 10 ms or longer, at the size that does best. What MFU is a fraction of.

    A product of n x n matrices counts 2 n^3.
    """
    return _peak(jnp.dtype(dtype).name)


@functools.cache
def _peak(dtype: str) -> float:
    best = 0.0
    for n in SIZES:
        x = jnp.ones((n, n), dtype)
        multiply = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
        jax.block_until_ready(multiply(x, x))
        began = time.perf_counter()
        jax.block_until_ready(multiply(x, x))
        repeats = max(1, int(0.01 / (time.perf_counter() - began)))
        end = time.perf_counter() + 0.15
        while (began := time.perf_counter()) < end:
            jax.block_until_ready([multiply(x, x) for _ in range(repeats)])
            best = max(best, repeats * 2.0 * n**3 / (time.perf_counter() - began))
        if repeats == 1:  # a larger one would take longer than it tells
            break
    return best


def duration(seconds: float) -> str:
    """Seconds as "8s", "2:05" or "1:02:05"."""
    whole = max(0, round(seconds))
    hours, minutes, left = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}" if minutes else f"{left}s"


def short(value: float) -> str:
    """Four significant digits below a thousand, else with k, M, G, T: "1.234", "41.2k"."""
    size = abs(value)
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.4g}"


class _View(Protocol):
    interval: float  # seconds between two showings

    def show(self, fraction: float, fields: Sequence[str]) -> None: ...
    def close(self) -> None: ...


class _Lines:
    interval = 5.0

    def __init__(self, out: TextIO):
        self._out = out

    def show(self, fraction: float, fields: Sequence[str]) -> None:
        print("  ".join(fields), file=self._out, flush=True)

    def close(self) -> None:
        pass


class _Bar:
    """Redrawn by the training thread itself: rich's own refresher would wake ten times a second beside it."""

    interval = 0.25

    def __init__(self, out: TextIO):
        self._live = Live(console=Console(file=out), auto_refresh=False, transient=False)
        self._live.start()

    def show(self, fraction: float, fields: Sequence[str]) -> None:
        grid = Table.grid(padding=(0, 1))
        whole = [field.replace(" ", "\u00a0") for field in fields]  # a narrow terminal breaks between fields only
        grid.add_row(ProgressBar(total=1.0, completed=fraction, width=24), Text("  ".join(whole)))
        self._live.update(grid, refresh=True)

    def close(self) -> None:
        self._live.stop()


class _Notebook:
    interval = 0.5

    def __init__(self) -> None:
        from IPython.display import display  # only where there is a notebook to show it in

        self._handle = display({"text/plain": ""}, raw=True, display_id=True)

    def show(self, fraction: float, fields: Sequence[str]) -> None:
        done = round(24 * fraction)
        self._handle.update({"text/plain": "█" * done + "░" * (24 - done) + "  " + "  ".join(fields)}, raw=True)

    def close(self) -> None:
        pass


def in_notebook() -> bool:
    """Whether this process is a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


class Progress(Hook):
    """Step, metrics, speed, MFU and time left, as they come.

    show: names of evaluation results to show, such as ("val/bits_per_byte",); the training loss always is.
    derived: {label: metrics -> number} of training metrics, such as {"bits/byte": lambda m: m["nll"] / log(2)}.
    per_step, unit: what one step works through, such as (8192, "tokens"); without them steps are counted.
    flops_per_step, peak: of the model, and in FLOP/s of all devices it runs on (`measured_matmul_peak`), for MFU.
    mode: "bar", "notebook", "lines", or "auto", which looks at `out` (default: standard output).
    Speed is that of the last interval between two logs, evaluations left out; the time left counts them.
    """

    def __init__(
        self,
        show: Sequence[str] = (),
        derived: Mapping[str, Callable[[Mapping[str, Any]], float]] | None = None,
        per_step: float = 1.0,
        unit: str = "steps",
        flops_per_step: float | None = None,
        peak: float | None = None,
        mode: str = "auto",
        out: TextIO | None = None,
    ):
        if mode not in MODES:
            raise ValueError(f"progress: mode={mode!r}; allowed: {', '.join(MODES)}")
        self._names, self._derived = tuple(show), dict(derived or {})
        self._per_step, self._unit, self._flops, self._peak = per_step, unit, flops_per_step, peak
        self._out = sys.stdout if out is None else out
        self._mode = mode
        self._view: _View | None = None

    def _opened(self) -> _View:
        if self._mode == "notebook" or (self._mode == "auto" and in_notebook()):
            return _Notebook()
        return _Bar(self._out) if self._mode == "bar" or (self._mode == "auto" and self._out.isatty()) else _Lines(self._out)

    def start(self, step: int, steps: int, learner: Learner, stage: int = 0) -> None:
        self.close()
        self._view, self._step, self._steps, self._stage = self._opened(), step, steps, stage
        self._metrics: dict[str, float] = {}
        self._doing = ""
        self._speed: float | None = None
        self._first: tuple[float, int] | None = None  # (time, step) after the first dispatch: compiling is no part of the speed
        self._mark: tuple[float, int] | None = None
        self._shown, self._pending = -float("inf"), True
        if not isinstance(self._view, _Lines):
            self._refresh()

    def step(self, step: int) -> None:
        self._step = step
        if self._first is None:
            self._first = self._mark = (time.monotonic(), step)
        if not isinstance(self._view, _Lines):
            self._refresh()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        now = time.monotonic()
        if self._mark is not None and step > self._mark[1]:
            self._speed = (step - self._mark[1]) / max(now - self._mark[0], 1e-9)
        self._mark = (now, step)
        loss = {"loss": float(np.mean(metrics["loss"]))} if "loss" in metrics else {}
        self._metrics |= loss | {label: float(np.mean(f(metrics))) for label, f in self._derived.items()}
        self._pending = True
        self._refresh()

    def evaluating(self, step: int, prefix: str) -> None:
        self._doing, self._pending = f"measuring {prefix}", True
        self._refresh(last=True)

    def evaluated(self, step: int, prefix: str, values: Mapping[str, Any]) -> None:
        for name in self._names:
            if name.startswith(f"{prefix}/") and name.removeprefix(f"{prefix}/") in values:
                self._metrics[name] = float(np.mean(values[name.removeprefix(f"{prefix}/")]))
        self._mark = (time.monotonic(), step)
        self._doing, self._pending = "", True
        self._refresh()

    def saved(self, step: int) -> None:
        self._mark = (time.monotonic(), step)

    def end(self, step: int) -> None:
        self._step = step
        self._refresh(last=True)

    def close(self) -> None:
        if self._view is not None:
            self._view.close()
            self._view = None

    def _refresh(self, last: bool = False) -> None:
        now = time.monotonic()
        if self._view is None or (now - self._shown < self._view.interval and not (last and self._pending)):
            return
        self._shown, self._pending = now, False
        self._view.show(min(self._step / max(self._steps, 1), 1.0), self.fields(now))

    def fields(self, now: float) -> list[str]:
        """What is shown at time `now` (of time.monotonic), left to right."""
        stage = f"stage {self._stage} " if self._stage else ""
        shown = [f"{stage}step {self._step:>{len(str(self._steps))}}/{self._steps}"]
        shown += [f"{name} {short(value)}" for name, value in self._metrics.items()]
        if self._speed is not None:
            shown.append(f"{short(self._speed * self._per_step)} {self._unit}/s")
            if self._flops and self._peak:
                shown.append(f"MFU {100 * self._speed * self._flops / self._peak:.1f}%")
        if self._first is None:
            shown.append("compiling")
        elif self._step > self._first[1]:
            left = (self._steps - self._step) * (now - self._first[0]) / (self._step - self._first[1])
            shown.append(f"{duration(left)} left" if self._step < self._steps else f"{duration(now - self._first[0])} in all")
        return [*shown, self._doing] if self._doing else shown
