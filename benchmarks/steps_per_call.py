"""Steps a second by how many are compiled into one call: a network so small that calls cost more than it, and a language model.

Each side takes the same 64 steps on batches that are on the device already, and ends in the same State, which is checked first
(to 1e-5, since a scan is another program). Times are of all 64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from benchmarks.harness import compare, run
from research.core.config import load_config
from research.core.loop import Program, compiled
from research.core.types import Stage
from research.experiment import build

NEEDS_PEERS = False
STEPS = 64
SIZES = (64, 8, 1)
WORK = {
    "MLP of MNIST-1D": ("configs/papers/mnist1d/config.py:mlp", {}),
    "lm/stdlib.py": ("configs/lm/stdlib.py", {}),
}


def stage_of(config: str, overrides: dict[str, str]) -> Stage:
    return build(load_config(config, overrides), config).stages[0]


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
    for name, (config, overrides) in WORK.items():
        stage = stage_of(config, overrides)
        drawn = stage.batches.open()
        batches = jax.device_put(jax.tree.map(lambda *x: np.stack(x), *(next(drawn) for _ in range(STEPS))))
        sides = {f"{n} a call": side(compiled(stage.learner, None), batches, n) for n in SIZES}
        ends = [s() for s in sides.values()]
        for other in ends[1:]:
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), ends[0]["params"], other["params"]
            )
        rows.append(compare(f"{name}, {STEPS} steps", sides))
    return rows


if __name__ == "__main__":
    run(main)
