"""What is told before a run touches its folder: periods, batches and checkpoints that do not fit together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from research.core import contracts
from research.core.checkpoint import CheckpointError, Checkpoints
from research.core.loop import check_periods, compiled, resumed
from research.core.mesh import Layout, entered
from research.core.placement import check_spanned
from research.core.types import Evaluation, Stage


def check(
    stages: Sequence[Stage],
    evaluations: Mapping[str, Evaluation],
    *,
    steps_per_call: int,
    log_every: int,
    checkpoints: Checkpoints,
    mesh: Layout | None,
    changed: Sequence[str] = (),
) -> None:
    """Raises ValueError (one line) where `loop.run` would refuse these stages at their start. Nothing is compiled or written.

    changed: how the config differs from that of the run that is to go on, if it does: then its checkpoint is read, and refused
    with these words where it does not fit.
    """
    check_spanned(mesh)
    for stage in stages:
        check_periods(stage.steps, steps_per_call, log_every, checkpoints.every, evaluations)
        contracts.check_batch(next(stage.batches.open()), stage.learner.batch, stage.batches.fingerprint)
        with entered(mesh):
            compiled(stage.learner, mesh)
    if not changed:
        return
    reader = Checkpoints(checkpoints.directory, read_only=True)
    saved = reader.latest()
    if saved is None:
        return
    try:
        stage = stages[saved.stage]
        resumed(saved, reader, stage.learner, stage.batches, mesh)
    except (IndexError, ValueError, CheckpointError) as error:
        said = f"the run has {len(stages)} stages" if isinstance(error, IndexError) else str(error)
        raise ValueError(f"cannot go on from {saved.path}: {said}; the config differs in {'; '.join(changed)}") from error
