"""A population of 32 MLPs of MNIST-1D in one program, beside the same 32 runs one after another.

Each side takes the same 50 steps of all members, of Adam on batches of 100 that are on the device already: the population at 50
steps a call; runs of one member at 50 steps a call, and at one step a call, whose calls are the Python and the dispatch that a
loop over runs pays. Every member's losses are equal on all sides, to rounding, which is checked first. Times are of all 1,600
member steps.

The roofline is what the machine cannot go below: FLOPs of matrix products at the rate of the fastest one measured here, and the
bytes that Adam must move, which reads and writes parameters and two moments once a step, at the rate at which an array of that
size is read and written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.harness import compare, run
from research.core.config import load_config
from research.core.flops import step_flops
from research.core.loop import Program, compiled
from research.core.mesh import Layout, entered, make_layout
from research.core.progress import measured_matmul_peak
from research.core.types import Stage
from research.experiment import build

NEEDS_PEERS = False
CONFIG = "configs/papers/mnist1d/config.py:mlp"
MEMBERS, STEPS = 32, 50
# Of a loss, by step. Rounding turns the signs of gradients near 0, and Adam takes a whole step of 0.01 along them, so that
# equal runs drift apart, as with any other order of summation. A member with another seed differs by 1e-2 at its first step.
TOLERANCES = {5: 1e-4, STEPS: 2e-2}


def stage(learner: dict[str, Any]) -> Stage:
    config = ConfigDict(load_config(CONFIG).to_dict())
    config.learner = {"watch": {}, **learner}
    return build(config).stages[0]


def side(program: Program, starts: list[Any], batches: Any, size: int) -> Callable[[], list[Any]]:
    """Takes the steps from each State, `size` a call; returns the losses of each, [STEPS, ...]."""
    key = jax.random.key(1)
    pieces = [jax.tree.map(lambda x, i=i: x[i : i + size], batches) for i in range(0, STEPS, size)]

    def steps() -> list[Any]:
        losses = []
        for start in starts:
            state, seen = jax.tree.map(jnp.copy, start), []
            for piece in pieces:
                state, metrics = program.step(state, piece, size, key)
                seen.append(metrics["loss"])
            losses.append(seen)
        return jax.block_until_ready(losses)

    return steps


def under(layout: Layout | None, steps: Callable[[], Any]) -> Callable[[], Any]:
    def entering() -> Any:
        with entered(layout):
            return steps()

    return entering


def loss_of(calls: list[Any]) -> np.ndarray:
    """[STEPS, ...] of the calls of one run."""
    return np.concatenate([np.asarray(total) / np.asarray(weight) for total, weight in calls])


def bandwidth(bytes_: int) -> float:
    """Bytes a second, read and written, of the best of many passes over an array of this size."""
    x = jnp.ones(bytes_ // 4, jnp.float32)
    step = jax.jit(lambda x: x * 1.0001, donate_argnums=0)
    x = jax.block_until_ready(step(x))
    best = 0.0
    for _ in range(50):
        began = time.perf_counter()
        for _ in range(10):
            x = step(x)
        jax.block_until_ready(x)
        best = max(best, 10 * 2 * bytes_ / (time.perf_counter() - began))
    return best


def main() -> list[dict[str, Any]]:
    jax.config.update("jax_num_cpu_devices", 2)
    many = stage({"wrap": ["population"], "population": {"n": MEMBERS, "method": "vmap"}})
    one = stage({"wrap": []})
    drawn = many.batches.open()
    batches = jax.device_put(jax.tree.map(lambda *x: np.stack(x), *(next(drawn) for _ in range(STEPS))))
    together, alone = compiled(many.learner, None), compiled(one.learner, None)
    layout = make_layout({"population": 2})
    key = jax.random.key(0)
    whole = [together.init(key, None)]
    singles = [alone.init(jax.random.fold_in(key, i), None) for i in range(MEMBERS)]
    with entered(layout):
        halves = compiled(many.learner, layout)
        cut = [halves.init(key, None)]
    sides = {
        f"population of {MEMBERS} over 2 devices": under(layout, side(halves, cut, halves.put(batches), STEPS)),
        f"population of {MEMBERS}": side(together, whole, batches, STEPS),
        "one step a call": side(alone, singles, batches, 1),
        f"{STEPS} steps a call": side(alone, singles, batches, STEPS),
    }
    expected, *others = (np.stack([loss_of(calls) for calls in call()], 1).reshape(STEPS, MEMBERS) for call in sides.values())
    for found in others:
        for until, tolerance in TOLERANCES.items():
            np.testing.assert_allclose(found[:until], expected[:until], rtol=tolerance)
    row = compare(f"{MEMBERS} MLPs of MNIST-1D, {STEPS} steps each", sides)

    flops = step_flops(one.learner) * MEMBERS * STEPS
    state = 3 * 4 * sum(x.size for x in jax.tree.leaves(singles[0]["params"])) * MEMBERS
    peak, rate = measured_matmul_peak(), bandwidth(state)
    least = max(flops / peak, 2 * state * STEPS / rate)
    taken = row["sides"][f"population of {MEMBERS}"]["median"]
    row["facts"] = {
        "roofline": {
            "MFLOPs a member step": round(flops / MEMBERS / STEPS / 1e6, 2),
            "GFLOP/s of the fastest matrix product": round(peak / 1e9, 1),
            "ms of matrix products at that rate": round(flops / peak * 1e3, 2),
            "MB of parameters and moments": round(state / 1e6, 2),
            "GB/s over an array of that size": round(rate / 1e9, 1),
            "ms of reading and writing them at that rate": round(2 * state * STEPS / rate * 1e3, 2),
            "largest of both, as a share of the population's median": f"{least / taken:.0%}",
        }
    }
    return [row]


if __name__ == "__main__":
    run(main)
