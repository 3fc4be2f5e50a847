"""What a run tells, and to whom: a hook is called by `fit` and may ask it to stop.

A sink of one's own (wandb, MLflow) is a Hook with `log` and `evaluated`, given to `run(experiment, hooks=[Wandb()])`, or to the
`Experiment(…, hooks=[Wandb()])` that a config's own `build` makes:

    import wandb
    from research.core.hooks import Hook

    class Wandb(Hook):
        def start(self, step, steps, learner, stage=0): self.run = wandb.init(resume="allow")
        def log(self, step, metrics): self.run.log({f"train/{k}": v for k, v in metrics.items()}, step=step)
        def evaluated(self, step, prefix, values): self.run.log({f"{prefix}/{k}": v for k, v in values.items()}, step=step)
        def close(self): self.run.finish()

Training metrics are known everywhere as "train/<name>", those of an evaluation as "<prefix>/<name>".
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from research.core import files
from research.core.names import suggestion
from research.core.types import Learner

Series = dict[str, tuple[np.ndarray, np.ndarray]]


class Hook:
    """Every method does nothing here. A hook may raise: the run then stops with that error. It may be started again after `end`
    or `close`, for the next stage or the next fit."""

    def start(self, step: int, steps: int, learner: Learner, stage: int = 0) -> None:
        """The stage begins at `step` of `steps`: 0, or where a checkpoint left off."""

    def step(self, step: int) -> None:
        """`step` batches have been dispatched. Called after each dispatch: it must be cheap, and not wait for the device."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Training metrics at `step`: {name: float, or NumPy array with one value a member of a population}."""

    def evaluating(self, step: int, prefix: str) -> None:
        """The evaluation called `prefix` begins, at `step`."""

    def evaluated(self, step: int, prefix: str, values: Mapping[str, Any]) -> None:
        """What the evaluation called `prefix` found at `step`: {name: float, NumPy array or str}, names without the prefix."""

    def saved(self, step: int) -> None:
        """A checkpoint of `step` has been begun."""

    def stop(self, step: int) -> str | None:
        """A reason to stop after `step`, in words; None to go on."""
        return None

    def end(self, step: int) -> None:
        """Training is over at `step`: finished, stopped by a hook, or interrupted."""

    def close(self) -> None:
        """Called last, whatever happened."""


def is_image(value: Any) -> bool:
    """Whether a value is an image, uint8 [height, width, 1 | 3 | 4], or a stack of them."""
    return isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim in (3, 4) and value.shape[-1] in (1, 3, 4)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, [] if there is none. A last line cut off by a kill is left out.

    Raises ValueError naming the number of a line before the last that is no JSON object.
    """
    if not path.exists():
        return []
    raw, lines = path.read_bytes().split(b"\n"), []
    for number, text in enumerate(raw, 1):
        if not text:
            continue
        try:
            line = json.loads(text)
            (line["stage"], line["step"], line["seconds"])
            lines.append(line)
        except (ValueError, KeyError, TypeError) as error:
            if number != len(raw):  # a whole line ends with a newline, so that the last part is empty
                shown = text[:60].decode(errors="replace")
                raise ValueError(f"{path}, line {number}, is no line of metrics: {shown!r}") from error
    return lines


_WHEN = ("stage", "step", "time", "seconds")


def _numbers(value: Any) -> np.ndarray | None:
    """float64 array, null as NaN; None for a text."""
    try:
        return np.asarray(value, np.float64)
    except (ValueError, TypeError):
        return None


def read_series(path: Path) -> Series:
    """{name: (steps int64 [n], values float64 [n] or [n, …])} of a metrics.jsonl; null is NaN, texts are left out.

    Steps run on over stages: those of a stage are counted from the last step of the one before.
    """
    lines = read_lines(path)
    ends = {stage: max(line["step"] for line in lines if line["stage"] == stage) for stage in {line["stage"] for line in lines}}
    found: dict[str, tuple[list[int], list[np.ndarray]]] = {}
    for line in lines:
        step = line["step"] + sum(end for stage, end in ends.items() if stage < line["stage"])
        for name, value in line.items():
            number = None if name in _WHEN else _numbers(value)
            if number is not None:
                steps, values = found.setdefault(name, ([], []))
                steps.append(step)
                values.append(number)
    return {
        name: (np.asarray(steps, np.int64), np.stack(values))
        for name, (steps, values) in found.items()
        if len({value.shape for value in values}) == 1
    }


class JsonLines(Hook):
    """Appends to a file of JSON lines: {"stage", "step", "time" (Unix seconds), "seconds" (spent on the run, restarts
    included), and metrics by their full names}. NaN and infinities are null, arrays lists; images are left out.

    A line is in the file when the call returns, so a run killed at any moment has lost none that came before a checkpoint.
    A run that goes on from `step` drops what was logged after it, and says each thing once.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file: int | None = None
        self._stage, self._before, self._began = 0, 0.0, 0.0

    @property
    def seconds(self) -> float:
        """Wall time spent on the run until now, earlier processes included."""
        return self._before + (time.monotonic() - self._began if self._file is not None else 0.0)

    def start(self, step: int, steps: int, learner: Learner, stage: int = 0) -> None:
        self.close()
        lines = read_lines(self.path)
        kept = [line for line in lines if (line["stage"], line["step"]) <= (stage, step)]
        whole = b"".join(files.json_bytes(line, indent=None) for line in kept)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.read_bytes() != whole:
            files.write_whole(self.path, whole)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._stage, self._began = stage, time.monotonic()
        self._before = max([self._before, *(line["seconds"] for line in lines)])

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._append(step, "train", metrics)

    def evaluated(self, step: int, prefix: str, values: Mapping[str, Any]) -> None:
        self._append(step, prefix, values)

    def _append(self, step: int, prefix: str, values: Mapping[str, Any]) -> None:
        if self._file is None:
            raise RuntimeError(f"{self.path}: JsonLines was given metrics before `start`")
        when = {"stage": self._stage, "step": step, "time": round(time.time(), 3), "seconds": round(self.seconds, 3)}
        line = when | {f"{prefix}/{name}": value for name, value in values.items() if not is_image(value)}
        files.append_whole(self._file, files.json_bytes(line, indent=None), self.path)

    def saved(self, step: int) -> None:
        if self._file is not None:
            os.fsync(self._file)

    def close(self) -> None:
        if self._file is not None:
            self._before = self.seconds
            os.close(self._file)
            self._file = None


class EarlyStopping(Hook):
    """Stops when `metric`, such as "val/bits_per_byte", has not improved for `patience` evaluations in a row.

    mode: "min" or "max". NaN is no improvement. The mean over members counts for a population.
    history: the run's metrics.jsonl, by which a run that goes on knows what was found before; without it patience starts anew.
    """

    def __init__(self, metric: str, patience: int, mode: str = "min", history: str | Path | None = None):
        if mode not in ("min", "max"):
            raise ValueError(f"early stopping: mode={mode!r}; allowed: 'min', 'max'")
        if patience < 1:
            raise ValueError(f"early stopping: patience={patience}; allowed: 1 or more")
        if "/" not in metric:
            raise ValueError(f"early stopping: metric={metric!r}; allowed: a name with its prefix, such as 'val/{metric}'")
        self.metric, self.patience, self.mode = metric, patience, mode
        self.history = None if history is None else Path(history)
        self._forget()

    def _forget(self) -> None:
        self._best, self._best_step, self._worse = math.inf, 0, 0

    def start(self, step: int, steps: int, learner: Learner, stage: int = 0) -> None:
        self._forget()
        for line in [] if self.history is None else read_lines(self.history):
            if line["stage"] == stage and line["step"] <= step and self.metric in line:
                self._see(line["step"], line[self.metric])

    def _see(self, step: int, value: Any) -> None:
        score = float(np.mean(np.asarray(value, np.float64)))
        if (score if self.mode == "min" else -score) < self._best:
            self._best, self._best_step, self._worse = score if self.mode == "min" else -score, step, 0
        else:
            self._worse += 1

    def evaluated(self, step: int, prefix: str, values: Mapping[str, Any]) -> None:
        wanted, name = self.metric.split("/", 1)
        if prefix != wanted:
            return
        if name not in values:
            known = [f"{prefix}/{k}" for k in values]
            raise ValueError(
                f"early stopping: metric={self.metric!r} is not measured; allowed: {', '.join(known)}"
                f"{suggestion(self.metric, known)}"
            )
        self._see(step, values[name])

    def stop(self, step: int) -> str | None:
        if self._worse < self.patience:
            return None
        best = self._best if self.mode == "min" else -self._best
        return f"{self.metric} has not improved for {self._worse} evaluations (best {best:.6g} at step {self._best_step})"
