"""From a config to an Experiment: the only place that knows names.

    config = load_config("configs/lm/stdlib.py:smoke")
    experiment = build(config)
    outcome = run(experiment)

A config file may define its own `build(config) -> Experiment`, in the project or anywhere else; `build(config, name)`, with
the name that `load_config` was given, then uses that one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax

from research.core import loop
from research.core.batches import together
from research.core.config import find, flat, is_section, load_config, load_module
from research.core.evaluate import names_of
from research.core.hooks import EarlyStopping
from research.core.loop import Outcome
from research.core.mesh import RULES, Pipeline
from research.core.names import choose
from research.core.stall import Stall
from research.core.types import Evaluation, Key, Learner, Stage, Task, Variables
from research.core.warm_start import warm_start
from research.core.workdir import load_run
from research.experiment.language import language
from research.experiment.meshes import check_fits, layout_of
from research.experiment.parts import Experiment, Parts, Table, Text
from research.experiment.sections import arguments, only
from research.experiment.supervised import supervised
from research.experiment.wrapping import chooses, learner_of, lifted, members_of, read_by, task_of
from research.learners import members
from research.transforms import teach

__all__ = ["Experiment", "Parts", "Table", "Text", "build", "members_of", "run"]

KINDS: Mapping[str, Callable[[Any], Parts]] = {
    "language_model": language,
    "classification": supervised,
    "regression": supervised,
}
COMMON = (
    "seed", "task", "model", "data", "stream", "transforms", "estimate", "optimizer", "learner", "train", "evaluate",
    "checkpoint", "early_stopping", "warm_start", "mesh", "rules", "pipeline",
)  # fmt: skip
SECTIONS = {
    "train": ("steps", "steps_per_call", "log_every", "replay", "stall_after"),
    "checkpoint": ("every", "keep_latest", "keep_best", "best", "mode"),
    "early_stopping": ("metric", "patience", "mode"),
    "warm_start": ("workdir", "rename"),
    "pipeline": Pipeline._fields,
}
OWN = {"language_model": ("sample", "closing"), "classification": (), "regression": ()}


def build(config: Any, name: str | None = None) -> Experiment:
    """The Experiment of a config; `name` is the config's path, whose own `build(config)` is used if it has one.

    Raises ValueError, one line, before anything compiles: an unknown or missing key, a name that is in no table, sizes that
    cannot work, data that is not there.
    """
    own = getattr(load_module(find(name)), "build", None) if name else None
    return own(config) if own else assembled(config)


def assembled(config: Any) -> Experiment:
    """The Experiment of a config in the project's own form, as configs/base.py begins it."""
    if "task" not in config or not is_section(config.task) or "name" not in config.task:
        raise ValueError(
            f"config lacks task.name; allowed: {', '.join(KINDS)}, or build(config, name) of a file with its own build"
        )
    kind = config.task.name
    make = choose(KINDS, kind, "task.name")
    only(config, (*COMMON, *OWN[kind]), "")
    for section, keys in SECTIONS.items():
        only(config[section], keys, section)
    if config.train.steps < 1:
        raise ValueError(f"train.steps={config.train.steps}; allowed: 1 or more")
    layout = layout_of(config)
    parts = make(config)
    teacher = _teacher(config.transforms)
    task = task_of(config, parts.task, teacher.task if teacher else None)
    learner, n = learner_of(config, task, parts.held_out), members_of(config)
    train = parts.train
    if chooses(config) and parts.held_out:
        train = together({"train": parts.train, "validation": parts.held_out.batches})
    enter = _warm(config.warm_start, parts.task)
    if teacher:
        enter = _taught(teach(task, teacher.variables), enter)
    _check_rules(config.rules, learner)
    check_fits(config, layout, learner)
    evaluations = lifted(parts.evaluations, n)
    _check_metrics(config, evaluations)
    stage = Stage(learner, train, config.train.steps, members(enter, n) if n and enter else enter)
    early = arguments(config.early_stopping)
    history = [partial(EarlyStopping, **early)] if early["patience"] else []
    return Experiment(
        [stage],
        evaluations,
        seed=config.seed,
        steps_per_call=config.train.steps_per_call,
        log_every=config.train.log_every,
        replay=config.train.replay,
        mesh=layout,
        checkpoints={**arguments(config.checkpoint), "best": config.checkpoint.best or None},
        hooks=[Stall(config.train.stall_after)] if config.train.stall_after else [],
        history_hooks=[lambda path, make=make: make(history=path) for make in history],
        units=parts.units,
        closing=() if n else parts.closing,
        sample=None if n else parts.sample,
        show=parts.show,
        derived=parts.derived,
        dtype=config.model.dtype if "dtype" in config.model else "float32",
        read=read_by(config),
    )


def _check_metrics(config: Any, evaluations: Mapping[str, Evaluation]) -> None:
    """ValueError where a metric is named that no evaluation measures, or only at the end, when it is too late to stop by it."""
    named = {"checkpoint.best": config.checkpoint.best}
    if config.early_stopping.patience:
        named["early_stopping.metric"] = config.early_stopping.metric
    for key, metric in named.items():
        measured = {f"{p}/{name}": e.every for p, e in evaluations.items() if metric for name in names_of(e.evaluator)}
        if metric:
            every = choose(measured, metric, key)
            if key == "early_stopping.metric" and not every:
                raise ValueError(f"{key}={metric!r} is measured once, at the end; allowed: what evaluate.every says how often")


def _check_rules(rules: Any, learner: Learner) -> None:
    """ValueError on a rule for a logical name that neither the defaults have nor an array carries."""
    specs, axes = jax.tree.leaves(learner.batch), jax.tree.leaves(learner.axes, is_leaf=lambda x: isinstance(x, jax.P))
    carried = {name for names in [*(s.axes for s in specs), *axes] for name in names if isinstance(name, str)}
    for name in rules:
        choose(dict.fromkeys({*RULES, *carried}), name, "rules: logical axis")


class Teacher(NamedTuple):
    task: Task
    variables: Variables


def _teacher(section: Any) -> Teacher | None:
    """The task and the trained variables that `transforms.distill` names by config and workdir, if it is listed."""
    if "wrap" not in section or "distill" not in section.wrap:
        return None
    keys = ("config", "workdir", "temperature", "weight")
    only(section.distill if "distill" in section else {}, keys, "transforms.distill")
    given = section.distill
    run = load_run(given.workdir)
    if run.state is None:
        raise ValueError(f"transforms.distill.workdir={given.workdir}: no trained variables there")
    config = load_config(given.config, dict(flat(run.config)))
    if members_of(config):
        raise ValueError(f"transforms.distill.workdir={given.workdir} holds a population; allowed: a run of one model")
    task = choose(KINDS, config.task.name, "task.name")(config).task
    return Teacher(task, learner_of(config, task).variables(run.state))


def _taught(teaching: Callable[..., Any], warm: Callable[..., Any] | None) -> Callable[..., Any]:
    """An `enter` that starts as `warm` does, if there is one, and puts the teacher in place."""
    return lambda variables, key: teaching(warm(variables, key) if warm else variables, key)


def _warm(section: Any, task: Task) -> Callable[..., Any] | None:
    """An `enter` that starts from the variables of `warm_start.workdir`, if one is named."""
    if not section.workdir:
        return None
    for pair in section.rename:
        if "->" not in pair:
            raise ValueError(f"warm_start.rename: {pair!r} is no 'pattern->replacement'")
    rename = [tuple(pair.split("->", 1)) for pair in section.rename]
    return warm_start(task.init, lambda: load_run(section.workdir).variables, print, rename=rename)


def run(experiment: Experiment, *, key: Key | None = None, **options: Any) -> Outcome:
    """Trains an experiment's stages in order; options as `core.loop.run` takes them (checkpoints, hooks, …) over its own.

    The outcome has the last stage's State, how it ended, and the last results of its evaluations.
    """
    given = {
        "evaluations": experiment.evaluations,
        "steps_per_call": experiment.steps_per_call,
        "log_every": experiment.log_every,
        "replay": experiment.replay,
        "mesh": experiment.mesh,
        **options,
    }
    given["hooks"] = [*experiment.hooks, *given.get("hooks", ())]
    return loop.run(experiment.stages, key=jax.random.key(experiment.seed) if key is None else key, **given)
