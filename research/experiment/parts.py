"""What an experiment is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from research.core.hooks import Hook
from research.core.mesh import Layout
from research.core.types import Array, Batch, Batches, Evaluation, Key, Stage, Task, Tree, Variables


class Table(NamedTuple):
    """Rows to show a person, at the end of a run and in its report."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]


class Text(NamedTuple):
    """A text to show a person, such as a sample."""

    title: str
    body: str


Closing = Callable[[Variables, Mapping[str, Any], Key], Sequence[Table | Text]]


class HeldOut(NamedTuple):
    """Batches without end of what is held out, with the Specs of the task's, and what is measured on each of their examples by
    the task's "predict", the smaller the better: (outputs, batch) -> [batch, ...]."""

    batches: Batches
    measure: Callable[[Tree, Batch], Array]


class Parts(NamedTuple):
    """A task with its data: what a kind of problem makes of a config before anything wraps it.

    train: what it learns from. evaluations: {prefix: Evaluation}. units: {"tokens": how many a batch holds}, for rates.
    closing: what to show when all is done, from the final variables and the last results.
    sample: (variables, key, how many) -> texts, where there is something to sample.
    held_out: what a learner that chooses while it trains, such as pbt, does so on, where some of the training set is.
    show: evaluation results to show while training; derived: {label: training metrics -> number} for the same.
    """

    task: Task
    train: Batches
    evaluations: Mapping[str, Evaluation]
    units: Mapping[str, int]
    closing: Sequence[Closing] = ()
    sample: Callable[..., Sequence[str]] | None = None
    show: Sequence[str] = ()
    derived: Mapping[str, Callable[[Mapping[str, Any]], float]] = {}
    held_out: HeldOut | None = None


class Experiment(NamedTuple):
    """All that `run` needs. A config's own `build(config)` gives one; stages and evaluations suffice.

    checkpoints: keywords of `core.checkpoint.Checkpoints` but its directory. hooks: more of them, such as early stopping; those
    that read the run's history are made by `history_hooks(path of metrics.jsonl)`.
    dtype: of the operands of products, for the peak that MFU is a share of. read: {key of the config: sha256} of what comes
    from other runs, for the run's record.
    """

    stages: Sequence[Stage]
    evaluations: Mapping[str, Evaluation] = {}
    seed: int = 0
    steps_per_call: int = 1
    log_every: int = 100
    replay: bool = True
    mesh: Layout | None = None
    checkpoints: Mapping[str, Any] = {}
    hooks: Sequence[Hook] = ()
    history_hooks: Sequence[Callable[[str], Hook]] = ()
    units: Mapping[str, int] = {}
    closing: Sequence[Closing] = ()
    sample: Callable[..., Sequence[str]] | None = None
    show: Sequence[str] = ()
    derived: Mapping[str, Callable[[Mapping[str, Any]], float]] = {}
    dtype: str = "float32"
    read: Mapping[str, str] = {}
