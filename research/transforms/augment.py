"""Batches changed at random, in training alone."""

from __future__ import annotations

from collections.abc import Callable

import jax

from research.core.contracts import abstract_batch, abstract_key, check_same
from research.core.types import Aux, Batch, Example, Key, Task, Tree, Variables
from research.transforms._augmentations import added_noise
from research.transforms._example import small_classifier


def augment(task: Task, fn: Callable[[Key, Batch], Batch], batch: Tree | None = None) -> Task:
    """The task on `fn(key, batch)`, a pure function of both; see `research.transforms.augmentations`. Its key is drawn
    from the step's. Methods stay as they are: what is evaluated is not augmented.

    batch: Specs of what `fn` is given, where they are not those of the task, such as images stored as uint8.

    Raises ContractError (one line: path, expected, got) where `fn` does not give what the task's Specs say.
    """
    given = task.batch if batch is None else batch
    made = jax.eval_shape(fn, abstract_key(), abstract_batch(given))
    check_same(abstract_batch(task.batch), made, "augment: fn(key, batch)")

    def loss(variables: Variables, batch: Batch, key: Key) -> tuple[jax.Array, Aux]:
        k_augment, k_loss = jax.random.split(key)
        return task.loss(variables, fn(k_augment, batch), k_loss)

    return task._replace(loss=loss, batch=given)


def example() -> Example:
    return Example(augment(small_classifier(), added_noise(0.1)))
