"""Batches and helpers of the learners' tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from research.estimates._example import linear_regression

KEY = jax.random.key(0)
TASK = linear_regression(batch=8, features=3)


def a_batch(i=0, mask=(1,) * 8):
    inputs = jax.random.normal(jax.random.key(100 + i), (8, 3))
    return {"inputs": inputs, "targets": inputs.sum(1) + 1, "mask": jnp.asarray(mask, jnp.float32)}


def bad_batch(i=0):
    batch = a_batch(i)
    return {**batch, "targets": batch["targets"].at[2].set(jnp.nan)}


def trained(learner, steps, batch=a_batch, state=None, key=KEY):
    """(State, metrics of every step), as the loop would: the step's key is fold_in(key, step)."""
    step = jax.jit(lambda s, b, k: learner.step(s, b, jax.random.fold_in(k, s["step"])))
    state, seen = jax.jit(learner.init)(key) if state is None else state, []
    for i in range(int(state["step"]), int(state["step"]) + steps):
        state, metrics = step(state, batch(i), key)
        seen.append(jax.tree.map(np.asarray, metrics))
    return state, seen


def close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def started(learner, key=KEY, *variables):
    """A first State, compiled: op by op a population's init takes seconds."""
    return jax.jit(learner.init)(key, *variables)


def stepped(learner, state, batch, key=KEY):
    """One compiled step."""
    return jax.jit(learner.step)(state, batch, key)
