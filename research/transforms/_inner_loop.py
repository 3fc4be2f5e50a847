"""A loop of optimizer steps inside a loss, which gradients pass through."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.core.types import Array, Aux, Batch, Key, Tree

InnerLoss = Callable[[Tree, Tree, Batch, Key], tuple[Array, Aux]]  # (what adapts, state, batch, key)


class Inner(NamedTuple):
    """What a step of the loop turns into the next: what adapts, the task's state, the optimizer's."""

    params: Tree
    state: Tree
    opt: Tree


def begin(tx: optax.GradientTransformation, params: Tree, state: Tree) -> Inner:
    return Inner(params, state, tx.init(params))


def inner_loop(
    loss: InnerLoss,
    tx: optax.GradientTransformation,
    start: Inner,
    batch: Callable[[Array], Batch],
    key: Key,
    steps: range,
    *,
    detach: bool = False,
    remat: bool = False,
) -> tuple[Inner, Array]:
    """(after these steps, the losses before each, [steps]): one `lax.scan`, so that the program is as long for 100 as for 1.

    batch: step -> its batch. detach: gradients do not pass through the inner gradients, as if these were constants: what is
    left of the derivative by the start is the identity (first-order MAML), of that by a learning rate the gradient times it.
    remat: a backward pass keeps only what each step begins with, and computes the rest again.
    An optimizer that asks for `value` and `grad` is given them.
    """
    full = optax.with_extra_args_support(tx)

    def step(inner: Inner, i: Array) -> tuple[Inner, Array]:
        moving = jax.value_and_grad(loss, has_aux=True)
        (value, aux), grads = moving(inner.params, inner.state, batch(i), jax.random.fold_in(key, i))
        told, grads = jax.lax.stop_gradient((value, grads)) if detach else (value, grads)
        updates, opt = full.update(grads, inner.opt, inner.params, value=told, grad=grads)
        return Inner(optax.apply_updates(inner.params, updates), aux.state, opt), value

    if not steps:
        return start, jnp.zeros((0,))
    return jax.lax.scan(jax.checkpoint(step) if remat else step, start, jnp.arange(steps.start, steps.stop))


def always(batch: Batch) -> Callable[[Array], Batch]:
    """The same batch at every step."""
    return lambda i: batch


def stacked(batches: Batch) -> Callable[[Array], Batch]:
    """Step i's batch of leaves [steps, ...]."""
    return lambda i: jax.tree.map(lambda x: jnp.asarray(x)[i], batches)
