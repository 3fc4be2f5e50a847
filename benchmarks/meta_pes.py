"""Meta-training a learned optimizer by PES: an MLP of 32 on Fashion-MNIST at 8x8, truncations of 50 steps, beside the outer
step of google's `learned_optimization` at equal settings.

The peer (github.com/google/learned_optimization; 0.0.1 on PyPI, of 2021) does not install: "No matching distribution found for
dm-launchpad-nightly==0.3.0.dev20211105", and it pins flax 0.3.3 and haiku 0.0.5 and calls `jax.tree_multimap`, which jax has no
more. So its outer step is written out here in today's jax, as its sources have it by default: plus and minus are unrolled one
after the other, 10 steps a call, on batches that the host draws (truncated_pes.py), and the network is products of matrices of
all features stacked (adafac_mlp_lopt.py). Ours unrolls both in one program that draws its batches, the network a sum of arrays,
and pays for one unperturbed problem more, whose loss it tells.

First both networks and both ways of stepping are shown to give equal losses of one problem on the same batches. A side's memory
is the largest resident size of a process of its own.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.harness import compare, run
from research.core.batches import nothing
from research.core.loop import compiled
from research.core.types import TaskFamily
from research.data.fashion_mnist import fashion_mnist
from research.estimates import pes
from research.learners import gradient
from research.optim.learned import per_parameter_mlp
from research.tasks.families import classifiers, shrunk
from research.transforms import unroll
from research.transforms.unroll import fresh, stepped

NEEDS_PEERS = False
LENGTH, PAIRS, BATCH, SIGMA, HORIZON, PER_JIT = 50, 16, 128, 0.01, 4, 10
OPTIMIZER = per_parameter_mlp()
MEMORY = "--memory"


def family() -> TaskFamily:
    images, labels = fashion_mnist()["train"]
    return classifiers(shrunk(images), labels, BATCH, [32])


def stacked(layers: Any, features: Sequence[jax.Array], constant: jax.Array) -> list[jax.Array]:
    """The network of `per_parameter_mlp` as the peer computes it."""
    x = jnp.stack(features, -1)
    x = jnp.concatenate([x, jnp.broadcast_to(constant, (*x.shape[:-1], constant.shape[0]))], -1)
    for i in range(len(layers)):
        bias = layers[str(i)]["bias"]
        x = x @ layers[str(i)]["kernel"] + bias.reshape((1,) * (x.ndim - 1) + bias.shape)
        x = x if i == len(layers) - 1 else jax.nn.relu(x)
    return [x[..., i] for i in range(x.shape[-1])]


THEIRS = mock.patch("research.optim.learned.mlp.network", stacked)  # while the peer's programs are traced


def ours(made: TaskFamily) -> Callable[[], Any]:
    """One outer step of the project's own learner, from the same State each time."""
    task = unroll(made, OPTIMIZER, LENGTH)
    program = compiled(gradient(task, optax.adam(1e-3), pes(SIGMA, PAIRS, HORIZON)), None)
    start, key = program.init(jax.random.key(0), None), jax.random.key(1)
    batch = jax.tree.map(lambda x: x[None], next(nothing().open()))

    def step() -> Any:
        state = jax.tree.map(jnp.copy, start)
        return jax.block_until_ready(program.step(state, batch, 1, key))

    return step


def peer(made: TaskFamily) -> Callable[[], Any]:
    """One outer step as `TruncatedPES` takes it: one jitted unroll of PER_JIT steps, called for plus and for minus in turn."""
    task = made.task({})
    theta = OPTIMIZER.init(jax.random.key(0))
    data = jax.tree.map(np.asarray, made.data)
    random = np.random.default_rng(0)

    def vector(tree: Any, key: jax.Array) -> Any:
        leaves, structure = jax.tree.flatten(tree)
        drawn = [SIGMA * jax.random.normal(jax.random.fold_in(key, i), (PAIRS, *x.shape)) for i, x in enumerate(leaves)]
        return jax.tree.unflatten(structure, drawn)

    def one_step(theta: Any, state: Any, batch: Any) -> tuple[Any, jax.Array]:
        tx, (inner, opt) = OPTIMIZER.transformation(theta), state
        value, grads = jax.value_and_grad(lambda p: task.loss({**inner, "params": p}, batch, jax.random.key(0))[0])(
            inner["params"]
        )
        updates, opt = tx.update(grads, opt, inner["params"])
        return ({**inner, "params": optax.apply_updates(inner["params"], updates)}, opt), value

    @jax.jit
    def begin(key: jax.Array) -> Any:
        def one(key: jax.Array) -> Any:
            inner = task.init(key)
            return inner, OPTIMIZER.transformation(theta).init(inner["params"])

        return jax.vmap(one)(jax.random.split(key, PAIRS))

    @partial(jax.jit, static_argnums=3)
    def moved(theta: Any, noise: Any, key: jax.Array, sign: float) -> Any:
        return jax.tree.map(lambda x, e: x[None] + sign * e, theta, noise)

    @jax.jit
    def unrolled(thetas: Any, state: Any, batches: Any) -> tuple[Any, jax.Array]:
        return jax.lax.scan(lambda s, b: jax.vmap(one_step)(thetas, s, b), state, batches)

    @jax.jit
    def credited(accumulator: Any, noise: Any, plus: Any, minus: Any) -> tuple[Any, Any]:
        total = jax.tree.map(jnp.add, accumulator, noise)
        share = (plus.mean(0) - minus.mean(0)) / (2 * SIGMA**2)
        return jax.tree.map(lambda e: jnp.tensordot(share, e, 1) / PAIRS, total), total

    tx = optax.adam(1e-3)
    apply = jax.jit(lambda g, s, p: tx.update(g, s, p))

    def drawn() -> Any:
        rows = random.integers(0, len(data["targets"]), (PER_JIT, PAIRS, BATCH))
        inputs = data["inputs"][rows].astype(np.float32) / 255
        return {"inputs": inputs, "targets": data["targets"][rows], "mask": np.ones(rows.shape, np.float32)}

    opt, start = tx.init(theta), begin(jax.random.key(1))
    accumulator = jax.tree.map(lambda x: jnp.zeros((PAIRS, *x.shape)), theta)

    def step() -> Any:
        key = jax.random.key(2)
        noise = vector(theta, key)
        plus, minus = (moved(theta, noise, key, sign) for sign in (1.0, -1.0))
        states, losses = [start, start], ([], [])
        for _ in range(LENGTH // PER_JIT):
            batches = drawn()
            for i, thetas in enumerate((plus, minus)):
                states[i], found = unrolled(thetas, states[i], batches)
                losses[i].append(found)
        grads, kept = credited(accumulator, noise, *(jnp.concatenate(x) for x in losses))
        return jax.block_until_ready((apply(grads, opt, theta), kept, states))

    return THEIRS(step)


def equal_losses(made: TaskFamily) -> None:
    """AssertionError unless both ways of stepping give the same losses from one problem on the same batches."""
    theta, key = OPTIMIZER.init(jax.random.key(0)), jax.random.key(3)
    tx, task = OPTIMIZER.transformation(theta), made.task({})
    state = fresh(made, tx, jax.random.key(4))
    _, losses = jax.jit(lambda s: stepped(made, tx, made.data, s, key, PER_JIT))(state)
    params, opt, found = state["inner"]["params"], tx.init(state["inner"]["params"]), []

    @jax.jit
    def step(params: Any, opt: Any, i: jax.Array) -> Any:
        k_batch, k_loss = jax.random.split(jax.random.fold_in(key, i))
        batch = made.batch({}, made.data, k_batch)
        value, grads = jax.value_and_grad(lambda p: task.loss({**state["inner"], "params": p}, batch, k_loss)[0])(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, value

    with THEIRS:
        for i in range(PER_JIT):
            params, opt, value = step(params, opt, jnp.asarray(i))
            found.append(value)
    np.testing.assert_allclose(losses, found, rtol=1e-5)


SIDES = {"ours: one program, batches drawn inside": ours, "the peer's outer step: two unrolls in turn": peer}


def memory_of(side: str) -> float:
    """GB of a process of its own that takes three outer steps."""
    done = subprocess.run([sys.executable, __file__, MEMORY, side], capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> list[dict[str, Any]]:
    made = family()
    equal_losses(made)
    work = f"PES outer step: MLP 32, Fashion-MNIST 8x8, {PAIRS} pairs, truncations of {LENGTH}"
    row = compare(work, {name: side(made) for name, side in SIDES.items()})
    facts = {name: {"peak memory, GB": round(memory_of(name), 3)} for name in SIDES}
    return [{**row, "facts": facts}]


if __name__ == "__main__":
    if MEMORY in sys.argv:
        step = SIDES[sys.argv[-1]](family())
        for _ in range(3):
            step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    else:
        run(main)
