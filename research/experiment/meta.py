"""An Experiment that learns to adapt to the tasks of a family, from configs that build themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from research.core.batches import from_function, nothing
from research.core.types import Batches, Evaluation, Stage, Task, TaskFamily, Tree
from research.evals import mean_of_loss
from research.experiment.parts import Experiment
from research.learners import gradient, members, population
from research.tasks.families import episodes
from research.transforms import drawn, over_tasks

TEST = 10**6  # the seed that test tasks are drawn from is this far from the run's
CHUNK = 100  # test tasks at once


def test_episodes(family: TaskFamily, count: int, points: Any, seed: int) -> Batches:
    """`count` episodes with `points.support` and `points.test` points, the same in every run of a seed, up to CHUNK a batch."""
    if count < 1:
        raise ValueError(f"test_tasks={count}; allowed: 1 or more")
    chunk = min(CHUNK, count)
    if count % chunk:
        raise ValueError(f"test_tasks={count}; allowed: up to {CHUNK}, or a multiple of it")
    draw = jax.jit(episodes(family, chunk, points.support, points.test))

    def batch(i: int) -> Tree:
        return jax.tree.map(np.asarray, draw(family.data, jax.random.fold_in(jax.random.key(TEST + seed), i)))

    return from_function(batch, count // chunk, f"{count} episodes, seed {seed}")


def meta(
    config: Any,
    family: Callable[[int], TaskFamily],
    method: Callable[..., Task],
    tx: optax.GradientTransformation,
    tests: Mapping[str, Mapping[str, Any]] | None = None,
) -> Experiment:
    """`config.members` seeds of learning over `family(batch)`'s tasks, each drawing `config.tasks` of them a step, by
    `method(task, support=points)` and `tx`; then the losses of `config.test_tasks` new tasks.

    config.points: {support, query, test}, examples of a task: adapted to, learned from, tested on. config.train: {steps,
    steps_per_call, log_every}; config.checkpoint: {every}. tests: {name: keywords of `method` in that test}; "test" alone, with
    none, by default.
    """
    points, train = config.points, config.train
    own = family(points.query)
    task = method(_task(own), support=points.support)
    learning = drawn(over_tasks(task, config.tasks), episodes(own, config.tasks, points.support, points.query), own.data)
    learner = population(gradient(learning, tx), config.members)
    held_out = family(points.test)
    batches = test_episodes(held_out, config.test_tasks, points, config.seed)

    def evaluation(options: Mapping[str, Any]) -> Evaluation:
        tested = method(_task(held_out), support=points.support, **options)
        many = over_tasks(tested, min(CHUNK, config.test_tasks))
        return Evaluation(members(mean_of_loss(many), config.members), batches, 0)

    return Experiment(
        [Stage(learner, nothing(), train.steps)],
        {name: evaluation(options) for name, options in (tests or {"test": {}}).items()},
        seed=config.seed,
        steps_per_call=train.steps_per_call,
        log_every=train.log_every,
        replay=False,
        checkpoints={"every": config.checkpoint.every},
        units={"tasks": config.tasks * config.members},
    )


def _task(family: TaskFamily) -> Task:
    return family.task(family.sample(jax.random.key(0)))
