"""Compositions at least three deep have every property of their parts, with no code of their own."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core.batches import from_function
from research.core.checkpoint import Checkpoints
from research.core.contracts import check_learner
from research.core.hooks import Hook
from research.core.loop import fit, run
from research.core.types import Evaluation, Example, Stage, TaskFamily
from research.estimates import accumulated, clipped_per_example, es, exact, noise_scale, pes, sharpness_aware, truncated
from research.evals import mean_of_loss
from research.learners import (
    after_step,
    average,
    evolution,
    forward,
    game,
    gradient,
    lookahead,
    loss_as_score,
    members,
    pbt,
    population,
    skip_nonfinite,
)
from research.learners.game import _shifting
from research.optim.learned import learned_scales
from research.optim.strategies import snes
from research.tasks.families import episodes, families, sinusoids
from research.transforms import augment, distill, drawn, maml, mixture, over_tasks, prototypical, unroll
from research.transforms._example import small_classifier
from tests.contracts import properties

KEY = properties.KEY
TASK = small_classifier(batch=4)
TX = optax.inject_hyperparams(optax.sgd)(learning_rate=0.05)
EPISODES = over_tasks(prototypical(TASK, 3, support=6), 4)
STRONG = sharpness_aware(0.05, accumulated(4))


def noised(task):
    """Noise on what is called "inputs", wherever it is in the batch."""

    def fn(key, batch):
        def one(path, x):
            return x + 0.1 * jax.random.normal(key, x.shape) if path[-1].key == "inputs" else x

        return jax.tree_util.tree_map_with_path(one, batch)

    return augment(task, fn)


def shrunk(variables, metrics):
    return {**variables, "params": jax.tree.map(lambda p: 0.99 * p, variables["params"])}


def few_shot():
    """A family of few-shot tasks: a step of MAML on the support of a sinusoid drawn anew, the loss that of its query."""
    sinusoid = sinusoids(4, hidden=[4])
    task = maml(sinusoid.task(sinusoid.sample(KEY)), optax.sgd(0.01))
    draw = episodes(sinusoid, None, support=4, query=4)
    return TaskFamily(lambda key: {}, lambda parameters: task, lambda parameters, data, key: draw(data, key))


def learned(length=2):
    """The training of MAML's start on few-shot tasks, by an optimizer whose rates are the params."""
    return unroll(few_shot(), learned_scales(learning_rate=0.01), length)


def adversaries():
    (d, discriminator), (g, generator) = _shifting().items()
    return game({d: (discriminator, TX, accumulated(2)), g: (generator, optax.sgd(0.1), STRONG)}, "alternating")


def two_tasks():
    return mixture({"a": (noised(TASK), 1.0), "b": (small_classifier(batch=4, classes=2), 0.5)}, private="head", per="example")


def distilled():
    return distill(noised(TASK), small_classifier(batch=4, width=6))


def meta_learned():
    """Where to start on a student that adapts to a support with its teacher's help."""
    return over_tasks(maml(distilled(), optax.sgd(0.1), 2), 2)


def meta_drawn():
    family = families()["sinusoids"]
    learned = over_tasks(maml(family.task({}), optax.sgd(0.01), 2), 3)
    return drawn(learned, episodes(family, 3, 4, 4), family.data)


COMPOSITIONS = {
    "population(gradient(over_tasks(augment), sharpness_aware(accumulated)))": lambda: population(
        gradient(over_tasks(noised(TASK), 4), TX, STRONG), 4, {"learning_rate": (0.01, 0.02, 0.05, 0.1)}
    ),
    "average(skip_nonfinite(gradient(distill(augment))))": lambda: average(skip_nonfinite(gradient(distilled(), TX)), 0.9),
    "population(skip_nonfinite(game(accumulated, sharpness_aware(accumulated))))": lambda: population(
        skip_nonfinite(adversaries()), 2, {"discriminator/learning_rate": (0.05, 0.1)}
    ),
    "after_step(population(average(gradient(mixture(augment), clipped_per_example))))": lambda: after_step(
        population(average(gradient(two_tasks(), TX, clipped_per_example(1.0, chunk=2)), 0.8), 2), shrunk
    ),
    "skip_nonfinite(average(gradient(over_tasks(distill(augment)), accumulated(sharpness_aware))))": lambda: skip_nonfinite(
        average(gradient(over_tasks(distilled(), 2), TX, accumulated(2, sharpness_aware(0.05))), 0.5)
    ),
    "population(forward(over_tasks(mixture(augment))), map)": lambda: population(
        forward(over_tasks(two_tasks(), 2)), 2, method="map", frozen="own"
    ),
    "population(average(gradient(unroll(few-shot tasks, learned scales), pes)))": lambda: population(
        average(gradient(learned(), TX, pes(0.05, 4, (2, 4))), 0.9), 2, {"learning_rate": (0.01, 0.1)}
    ),
    "skip_nonfinite(gradient(unroll(few-shot tasks), truncated(es)))": lambda: skip_nonfinite(
        gradient(learned(), TX, truncated(3, es(0.05, 2), problems=2))
    ),
    "population(lookahead(gradient(over_tasks(augment), noise_scale(sharpness_aware))))": lambda: population(
        lookahead(gradient(over_tasks(noised(TASK), 4), TX, noise_scale(2, sharpness_aware(0.05))), 2), 2
    ),
    "skip_nonfinite(average(evolution(distill(augment))))": lambda: skip_nonfinite(
        average(evolution(distilled(), snes(4, 0.1)), 0.5)
    ),
    "pbt(population(skip_nonfinite(gradient(over_tasks(prototypical), sharpness_aware(accumulated)))))": lambda: pbt(
        population(skip_nonfinite(gradient(EPISODES, TX, STRONG)), 4, {"learning_rate": (0.01, 0.02, 0.05, 0.1)}),
        loss_as_score(EPISODES),
        {"learning_rate": (1e-3, 1.0)},
        every=2,
    ),
    "population(population(after_step(gradient(augment))))": lambda: population(
        population(after_step(gradient(noised(TASK), TX), shrunk), 2), 3
    ),
    "population(gradient(over_tasks(maml(distill))))": lambda: population(gradient(meta_learned(), TX), 8),
    "average(gradient(drawn(over_tasks(maml))))": lambda: average(gradient(meta_drawn(), TX), 0.9),
}
ALL = list(COMPOSITIONS)
ONE_BY_DEFAULT = [pytest.param(name, marks=() if i == 0 else pytest.mark.slow) for i, name in enumerate(ALL)]


@functools.cache
def of(name):
    return Example(COMPOSITIONS[name]())


@pytest.mark.parametrize("name", ALL)
def test_contract_by_shapes(name):
    properties.abstract(of(name))


@pytest.mark.parametrize("name", ONE_BY_DEFAULT)
def test_steps_are_finite_and_deterministic(name):
    properties.finite_and_deterministic(of(name))


@pytest.mark.parametrize("name", ONE_BY_DEFAULT)
def test_saved_and_restored_it_goes_on_bit_for_bit(name, tmp_path):
    properties.resumes_bit_for_bit(of(name), tmp_path)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in ALL])
def test_a_population_is_its_members_one_by_one(name):
    properties.population_equals_one_by_one(of(name))


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in ALL])
def test_methods_run_on_their_inputs_alone_and_over_members(name):
    properties.methods_run(of(name))


def batches_of(task, length=None):
    def host(i):
        return jax.tree.map(np.asarray, properties.drawn(task.batch, jax.random.fold_in(KEY, i)))

    return from_function(host, length, "drawn")


def test_an_evaluator_over_the_averages_of_a_population_is_that_of_each():
    """members(mean_of_loss) on population(average(gradient(augment))), by `fit`."""
    learner = population(average(gradient(noised(TASK), TX), 0.5), 3)
    seen = {}

    class Keep(Hook):
        def evaluated(self, step, prefix, values):
            seen[step] = values

    evaluation = Evaluation(members(mean_of_loss(TASK), 3), batches_of(TASK, 2), 2)
    state = fit(learner, batches_of(TASK), 4, key=KEY, log_every=2, evaluations={"val": evaluation}, hooks=[Keep()])
    assert sorted(seen) == [2, 4] and seen[4]["nll"].shape == (3,)
    variables = learner.variables(state)
    for m in range(3):
        own = {
            **jax.tree.map(lambda x, m=m: x[m], {k: variables[k] for k in ("params", "state")}),
            "frozen": variables["frozen"],
        }
        found = [
            TASK.loss(own, batch, KEY)[1].metrics["nll"]
            for batch in (properties.drawn(TASK.batch, jax.random.fold_in(KEY, i)) for i in range(2))
        ]
        assert seen[4]["nll"][m] == pytest.approx(float(sum(s for s, _ in found) / sum(w for _, w in found)), rel=1e-5)


class Killed(Exception):
    pass


class KillAt(Hook):
    """Raises at the n-th dispatch of all stages."""

    def __init__(self, n):
        self.left = n

    def step(self, step):
        self.left -= 1
        if not self.left:
            raise Killed


def stages():
    """Train a teacher, calibrate it, distill from it: gradient -> forward -> gradient(distill)."""
    teacher, student = small_classifier(batch=4, width=6), distilled()

    def enter(variables, key):
        return {**student.init(key), "frozen": {"task": TASK.init(key)["frozen"], "teacher": variables}}

    return [
        Stage(gradient(teacher, TX), batches_of(teacher), 4),
        Stage(forward(teacher), batches_of(teacher), 2),
        Stage(average(skip_nonfinite(gradient(student, TX, STRONG)), 0.9), batches_of(student), 4, enter),
    ]


def test_stages_hand_on_their_variables_and_frozen_stays():
    outcome = run(stages(), key=KEY, log_every=2)
    teacher, calibration, _ = stages()
    trained = fit(teacher.learner, teacher.batches, 4, key=jax.random.fold_in(KEY, 0), log_every=2)
    held = outcome.state["frozen"]["teacher"]
    properties.same_bits(held["params"], trained["params"], "the teacher's params")
    assert int(held["state"]["inputs"]["seen"]) == 4 * 4 + 2 * 4  # both stages' examples
    assert int(outcome.state["step"]) == 4 and outcome.reason == "finished"


@pytest.mark.parametrize(
    "kill",
    [
        5,
        pytest.param(3, marks=pytest.mark.slow),
        pytest.param(8, marks=pytest.mark.slow),
        pytest.param(10, marks=pytest.mark.slow),
    ],
)
def test_stages_killed_anywhere_go_on_bit_for_bit(kill, tmp_path):
    whole = run(stages(), key=KEY, log_every=1)
    first = Checkpoints(tmp_path, every=2)
    with pytest.raises(Killed):
        run(stages(), key=KEY, log_every=1, checkpoints=first, hooks=[KillAt(kill)])
    first.close()  # a save in the background ends; real kills, of processes, are tested with the verbs
    resumed = run(stages(), key=KEY, log_every=1, checkpoints=Checkpoints(tmp_path, every=2))
    properties.same_bits(resumed.state, whole.state, "resumed")


def test_a_population_of_games_learns_at_the_rates_it_was_given():
    """Three deep, in numbers: the member with the larger rate has moved its discriminator further."""
    run_of = properties.run_of(of(ALL[2]))
    start = run_of.init(KEY)
    state, _ = run_of.steps(start, 0, 1)
    moved = jnp.abs(state["params"]["discriminator"]["slope"] - start["params"]["discriminator"]["slope"])
    assert moved[1] == pytest.approx(2 * float(moved[0]), rel=1e-4)


def test_over_tasks_split_by_accumulation_is_the_whole():
    """accumulated cuts the axis of tasks that over_tasks calls "batch", not the batches within."""
    task = over_tasks(TASK, 4)
    whole, split = (properties.run_of(Example(gradient(task, TX, e))) for e in (exact(), accumulated(4)))
    check_learner(split.learner)
    properties.close(*(r.steps(r.init(KEY), 0, 2)[0] for r in (whole, split)), properties.PROGRAM, "state")
