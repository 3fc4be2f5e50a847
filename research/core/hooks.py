"""What a run tells, and to whom: a hook is called by `fit` and may ask it to stop.

A sink of one's own (wandb, MLflow) is a Hook with `log` and `evaluated`:

    class Wandb(Hook):
        def start(self, step, steps, learner): self.run = wandb.init(resume="allow")
        def log(self, step, metrics): self.run.log(dict(metrics), step=step)
        def evaluated(self, step, prefix, values): self.run.log({f"{prefix}/{k}": v for k, v in values.items()}, step=step)
        def close(self): self.run.finish()
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from research.core.types import Learner


class Hook:
    """Every method does nothing here. A hook may raise: the run then stops with that error."""

    def start(self, step: int, steps: int, learner: Learner) -> None:
        """The run begins at `step` of `steps`: 0, or where a checkpoint left off."""

    def step(self, step: int) -> None:
        """`step` batches have been dispatched. Called after each dispatch, so it must be cheap and must not wait for the device."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Training metrics at `step`: {name: float, or NumPy array with one value a member of a population}."""

    def evaluated(self, step: int, prefix: str, values: Mapping[str, Any]) -> None:
        """What the evaluation called `prefix` found at `step`: {name: float or NumPy array}, names without the prefix."""

    def saved(self, step: int) -> None:
        """A checkpoint of `step` has been begun."""

    def stop(self, step: int) -> str | None:
        """A reason to stop after `step`, in words; None to go on."""
        return None

    def end(self, step: int) -> None:
        """Training is over at `step`: finished, stopped by a hook, or interrupted."""

    def close(self) -> None:
        """Called exactly once, whatever happened, last."""
