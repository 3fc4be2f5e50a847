"""What may wrap a task, an estimate and a learner, by the name a config gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from research import estimates, learners, optim, transforms
from research.core.types import Estimate, Evaluation, Learner, Task
from research.experiment.sections import arguments, called, wrapped
from research.transforms import augmentations


def _augment(task: Task, *, crop: int, flip: bool) -> Task:
    return transforms.augment(task, augmentations.crop_and_flip(crop, flip))


TRANSFORMS: Mapping[str, Callable[..., Task]] = {"augment": _augment}
# An estimate to begin with, and what may wrap it.
BASES: Mapping[str, Callable[..., Estimate]] = {
    "exact": estimates.exact,
    "clipped_per_example": estimates.clipped_per_example,
}
ESTIMATES: Mapping[str, Callable[..., Estimate]] = {
    "accumulated": lambda inner, *, n: estimates.accumulated(n, inner),
    "sharpness_aware": lambda inner, *, rho: estimates.sharpness_aware(rho, inner),
}
LEARNERS: Mapping[str, Callable[..., Learner]] = {
    "skip_nonfinite": learners.skip_nonfinite,
    "average": lambda learner, *, decay: learners.average(learner, decay),
    "population": lambda learner, *, n, method: learners.population(learner, n, method=method),
}


def task_of(config: Any, task: Task, teacher: Task | None) -> Task:
    """The task, wrapped by what `config.transforms` lists. distill: {config, workdir, temperature, weight}; `teacher` is the
    task that they name."""

    def distilled(task: Task, *, config: str, workdir: str, temperature: float, weight: float) -> Task:
        return transforms.distill(task, teacher, temperature=temperature, weight=weight)

    return wrapped(task, {**TRANSFORMS, "distill": distilled}, config.transforms, "transforms")


def learner_of(config: Any, task: Task) -> Learner:
    """The gradient learner of `config.estimate`, `config.optimizer` and `config.learner` on a task.

    config.estimate: {name: "exact", wrap: ["accumulated"], accumulated: {n: 4}}, and the keys of the one that is named.
    config.learner.watch: {group: regular expression} for norms by group of paths.
    """
    around = config.estimate.wrap
    base = called(BASES, _without(config.estimate, "wrap", *around), "estimate")
    estimate = wrapped(base, ESTIMATES, {k: config.estimate[k] for k in ("wrap", *around) if k in config.estimate}, "estimate")
    tx = optim.make(arguments(config.optimizer), steps=config.train.steps)
    base = learners.gradient(task, tx, estimate, watch=arguments(config.learner.watch))
    return wrapped(base, LEARNERS, _without(config.learner, "watch"), "learner")


def _without(section: Any, *keys: str) -> dict[str, Any]:
    return {k: section[k] for k in section if k not in keys}


def members_of(config: Any) -> int:
    """How many members the learner has; 0 where it is no population."""
    return config.learner.population.n if "population" in config.learner.wrap else 0


def lifted(evaluations: Mapping[str, Evaluation], n: int) -> dict[str, Evaluation]:
    """The evaluations, of every member where there are n."""
    if not n:
        return dict(evaluations)
    return {name: e._replace(evaluator=learners.members(e.evaluator, n)) for name, e in evaluations.items()}
