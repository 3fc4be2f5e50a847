"""What may wrap a task, an estimate and a learner, by the name a config gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from research import estimates, learners, optim, transforms
from research.core import metrics
from research.core.names import choose
from research.core.types import Array, Batch, Estimate, Evaluation, Key, Learner, Task, Variables
from research.experiment.parts import HeldOut
from research.experiment.sections import arguments, called, wrapped
from research.optim.learned import restored
from research.transforms import augmentations


def _augment(task: Task, *, crop: int, flip: bool) -> Task:
    return transforms.augment(task, augmentations.crop_and_flip(crop, flip))


def _accumulated(inner: Estimate, *, n: int) -> Estimate:
    return estimates.accumulated(n, inner)


def _noise_scale(inner: Estimate, *, n: int) -> Estimate:
    return estimates.noise_scale(n, inner)


def _sharpness_aware(inner: Estimate, *, rho: float) -> Estimate:
    return estimates.sharpness_aware(rho, inner)


def _truncated(inner: Estimate, *, horizon: int | Sequence[int], problems: int, staggered: bool = True) -> Estimate:
    return estimates.truncated(horizon, inner, problems, staggered=staggered)


def _average(learner: Learner, *, decay: float) -> Learner:
    return learners.average(learner, decay)


def _lookahead(learner: Learner, *, every: int, alpha: float) -> Learner:
    return learners.lookahead(learner, every, alpha)


def _population(learner: Learner, *, n: int, method: str, vary: Mapping[str, Sequence[float]] | None = None) -> Learner:
    return learners.population(learner, n, vary, method=method)


TRANSFORMS: Mapping[str, Callable[..., Task]] = {"augment": _augment}
# An estimate to begin with, and what may wrap it.
BASES: Mapping[str, Callable[..., Estimate]] = {
    "exact": estimates.exact,
    "clipped_per_example": estimates.clipped_per_example,
    "es": estimates.es,
    "pes": estimates.pes,
    "noise_reuse": estimates.noise_reuse,
}
ESTIMATES: Mapping[str, Callable[..., Estimate]] = {
    "accumulated": _accumulated,
    "noise_scale": _noise_scale,
    "sharpness_aware": _sharpness_aware,
    "truncated": _truncated,
}
LEARNERS: Mapping[str, Callable[..., Learner]] = {
    "skip_nonfinite": learners.skip_nonfinite,
    "average": _average,
    "lookahead": _lookahead,
    "population": _population,
}


def task_of(config: Any, task: Task, teacher: Task | None) -> Task:
    """The task, wrapped by what `config.transforms` lists. distill: {config, workdir, temperature, weight}; `teacher` is the
    task that they name."""

    def distilled(task: Task, *, config: str, workdir: str, temperature: float, weight: float) -> Task:
        return transforms.distill(task, teacher, temperature=temperature, weight=weight)

    return wrapped(task, {**TRANSFORMS, "distill": distilled}, config.transforms, "transforms")


# {name of an optimizer: what it reads from another run}, each {key of its section: sha256} by the section.
READS: Mapping[str, Callable[[Any], dict[str, str]]] = {
    "learned": lambda section: {"optimizer.path": restored(section.path).sha256},
}


def read_by(config: Any) -> dict[str, str]:
    """{key of the config: sha256} of what the optimizer reads from another run."""
    section = config.optimizer
    return READS[section.name](section) if section.name in READS else {}


def learner_of(config: Any, task: Task, held_out: HeldOut | None = None) -> Learner:
    """The gradient learner of `config.estimate`, `config.optimizer` and `config.learner` on a task.

    config.learner.pbt: {every, hyper: {name: [lowest, highest]}, fraction, factors, resample}, where wrap has "pbt" after
    "population"; members are scored on `held_out`.

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

    def pbt(
        learner: Learner,
        *,
        every: int,
        hyper: Mapping[str, Sequence[float]],
        fraction: float = 0.2,
        factors: Sequence[float] = (0.8, 1.2),
        resample: float = 0.0,
    ) -> Learner:
        if held_out is None:
            raise ValueError(
                "learner.pbt scores members on held-out examples, and there are none; allowed: classification or regression "
                "with stream.validation of at least stream.batch"
            )
        score = _score(task, held_out)
        return learners.pbt(learner, score, hyper, every, fraction=fraction, factors=factors, resample=resample)

    return wrapped(base, {**LEARNERS, "pbt": pbt}, _without(config.learner, "watch"), "learner")


def _score(task: Task, held_out: HeldOut) -> learners.Score:
    """The mean of what is measured on held-out examples."""
    predict = choose(task.methods, "predict", "learner.pbt: the method of the task").apply

    def score(variables: Variables, batch: Batch, key: Key) -> Array:
        outputs = predict(variables, {"inputs": batch["inputs"]}, key)
        return metrics.mean(metrics.masked(held_out.measure(outputs, batch), batch["mask"]))

    return score


def chooses(config: Any) -> bool:
    """Whether the learner's batches are {"train", "validation"}."""
    return "wrap" in config.learner and "pbt" in config.learner.wrap


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
