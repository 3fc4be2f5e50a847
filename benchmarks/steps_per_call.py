"""Steps a second by how many are compiled into one call: a network so small that calls cost more than it, and a language model.

Each side takes the same 64 steps on batches that are on the device already. All end in the same parameters bit for bit, which
is checked first. Times are of all 64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from benchmarks.harness import compare, run
from research.core.config import load_config
from research.core.loop import Program, compiled
from research.experiment import build

NEEDS_PEERS = False
STEPS = 64
SIZES = (64, 8, 1)
WORK = {
    "MLP of MNIST-1D": "configs/papers/mnist1d/config.py:mlp",
    "lm/stdlib.py": "configs/lm/stdlib.py",
}


def calls(batches: Any, size: int) -> Iterator[Any]:
    for i in range(0, STEPS, size):
        yield jax.tree.map(lambda x: x[i : i + size], batches)  # noqa: B023


def side(program: Program, batches: Any, size: int) -> Callable[[], Any]:
    """Takes the steps, `size` a call, from the same State; returns the last one."""
    start = program.init(jax.random.key(0), None)
    key = jax.random.key(1)
    pieces = list(calls(batches, size))

    def steps() -> Any:
        state = jax.tree.map(jax.numpy.copy, start)
        for piece in pieces:
            state, _ = program.step(state, piece, size, key)
        return jax.block_until_ready(state)

    return steps


def main() -> list[dict[str, Any]]:
    rows = []
    for name, config in WORK.items():
        stage = build(load_config(config), config).stages[0]
        drawn = stage.batches.open()
        batches = jax.device_put(jax.tree.map(lambda *x: np.stack(x), *(next(drawn) for _ in range(STEPS))))
        sides = {f"{n} a call": side(compiled(stage.learner, None), batches, n) for n in SIZES}
        ends = [s() for s in sides.values()]
        for other in ends[1:]:
            jax.tree.map(np.testing.assert_array_equal, ends[0]["params"], other["params"])
        rows.append(compare(f"{name}, {STEPS} steps", sides))
    return rows


if __name__ == "__main__":
    run(main)
