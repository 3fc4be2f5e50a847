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


def _accumulated(inner: Estimate, *, n: int) -> Estimate:
    return estimates.accumulated(n, inner)


def _sharpness_aware(inner: Estimate, *, rho: float) -> Estimate:
    return estimates.sharpness_aware(rho, inner)


def _average(learner: Learner, *, decay: float) -> Learner:
    return learners.average(learner, decay)


def _population(learner: Learner, *, n: int, method: str) -> Learner:
    return learners.population(learner, n, method=method)


TRANSFORMS: Mapping[str, Callable[..., Task]] = {"augment": _augment}
# An estimate to begin with, and what may wrap it.
BASES: Mapping[str, Callable[..., Estimate]] = {
    "exact": estimates.exact,
    "clipped_per_example": estimates.clipped_per_example,
}
ESTIMATES: Mapping[str, Callable[..., Estimate]] = {
    "accumulated": _accumulated,
    "sharpness_aware": _sharpness_aware,
}
LEARNERS: Mapping[str, Callable[..., Learner]] = {
    "skip_nonfinite": learners.skip_nonfinite,
    "average": _average,
    "population": _population,
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
    around = config.estimate.wrap if "wrap" in config.estimate else ()
    base = called(BASES, _without(config.estimate, "wrap", *around), "estimate")
    estimate = wrapped(base, ESTIMATES, {k: config.estimate[k] for k in ("wrap", *around) if k in config.estimate}, "estimate")
    if "watch" not in config.learner:
        raise ValueError("config lacks learner.watch; allowed: {group: regular expression}, or {}")
    tx = optim.make(arguments(config.optimizer), steps=config.train.steps)
    base = learners.gradient(task, tx, estimate, watch=arguments(config.learner.watch))
    return wrapped(base, LEARNERS, _without(config.learner, "watch"), "learner")


def _without(section: Any, *keys: str) -> dict[str, Any]:
    return {k: section[k] for k in section if k not in keys}


def members_of(config: Any) -> int:
    """How many members the learner has; 0 where it is no population."""
    section = config.learner
    return section.population.n if "wrap" in section and "population" in section.wrap and "population" in section else 0


def lifted(evaluations: Mapping[str, Evaluation], n: int) -> dict[str, Evaluation]:
    """The evaluations, of every member where there are n."""
    if not n:
        return dict(evaluations)
    return {name: e._replace(evaluator=learners.members(e.evaluator, n)) for name, e in evaluations.items()}
