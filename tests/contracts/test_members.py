"""The contract suite over every member of the tree. A new module with its example() is covered without a line here.

By default every member is checked by shapes, and one of each family takes real steps; the others do with `-m slow`.
"""

from __future__ import annotations

import importlib
import inspect

import pytest

from research.core.types import Estimate, Evaluator, Learner, Task
from tests.contracts import properties
from tests.contracts.discovery import CONTRACTS, PACKAGES, example_of, is_factory, members, public_modules

FAMILIES = {
    "tasks": "tasks/classification",
    "transforms": "transforms/augment",
    "estimates": "estimates/accumulated",
    "learners": "learners/population",
    "evals": "evals/mean_of_loss",
}


def of_packages(*packages, all_by_default=False):
    """The members of these packages; those that do not stand for their family are slow."""
    found = []
    for package in packages:
        names = [m for m in members() if m.startswith(f"{package}/")]
        chosen = FAMILIES[package] if FAMILIES[package] in names else next(iter(names), None)
        found += [pytest.param(m, marks=() if all_by_default or m == chosen else pytest.mark.slow) for m in names]
    return found


STEPPING = [p for p in of_packages("tasks", "transforms", "estimates", "learners") if p.values[0] != "learners/members"]
WITH_A_TASK = of_packages("tasks", "transforms", "estimates")
EVALUATORS = [*of_packages("evals"), pytest.param("learners/members", marks=pytest.mark.slow)]


OF_MANY = ("research.tasks.families",)  # with several factories, which are reached through the module


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_factory_has_an_example_and_is_exported(package):
    home = importlib.import_module(f"research.{package}")
    for name in public_modules(home):
        module, own = importlib.import_module(name), name.rpartition(".")[2]
        function = getattr(module, own, None)
        assert inspect.isfunction(function), f"{name}: no function of its name (a helper module begins with an underscore)"
        exported = module if name in OF_MANY else function
        assert getattr(home, own, None) is exported, f"{name}: research.{package} does not export {own}"
        if is_factory(module):
            assert callable(getattr(module, "example", None)), f"{name}: no example() beside {own}"


@pytest.mark.parametrize("member", members())
def test_an_example_holds_a_member_and_what_it_runs_on(member):
    example = example_of(member)
    assert type(example.member).__name__ in CONTRACTS
    if isinstance(example.member, (Estimate, Evaluator)):
        assert isinstance(example.task, Task), "an Estimate or Evaluator needs a task to run on"
    if isinstance(example.member, (Task, Learner)):
        assert example.task is None, "a Task or Learner brings its own"
    assert bool(example.why) is not example.exact_gradient, "why: exactly where the gradient is meant to differ from the loss's"


@pytest.mark.parametrize("member", members())
def test_contract_by_shapes(member):
    properties.abstract(example_of(member))


@pytest.mark.parametrize("member", STEPPING)
def test_steps_are_finite_and_deterministic(member):
    properties.finite_and_deterministic(example_of(member))


@pytest.mark.parametrize("member", STEPPING)
def test_saved_and_restored_it_goes_on_bit_for_bit(member, tmp_path):
    properties.resumes_bit_for_bit(example_of(member), tmp_path)


@pytest.mark.parametrize("member", STEPPING)
def test_a_population_is_its_members_one_by_one(member):
    properties.population_equals_one_by_one(example_of(member))


@pytest.mark.parametrize("member", STEPPING)
def test_methods_run_on_their_inputs_alone_and_over_members(member):
    properties.methods_run(example_of(member))


@pytest.mark.parametrize("member", of_packages("tasks", "transforms"))
def test_the_loss_is_the_weighted_mean_of_its_shards(member):
    properties.loss_is_the_weighted_mean_of_shards(example_of(member))


@pytest.mark.parametrize("member", WITH_A_TASK)
def test_the_gradient_agrees_with_finite_differences(member):
    example = example_of(member)
    if example.exact_gradient:
        properties.gradient_agrees_with_finite_differences(example)


@pytest.mark.parametrize("member", EVALUATORS)
def test_stats_add_up_over_batches(member):
    properties.evaluator_is_sound(example_of(member))


@pytest.mark.parametrize("member", EVALUATORS)
def test_masked_rows_count_nothing(member):
    properties.masked_rows_count_nothing(example_of(member))
