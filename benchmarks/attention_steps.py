"""A training step of two configs, with the attention they have beside others: what sparse attention is worth in a whole model.

The main job (lm/stdlib.py: 2 x 2,048 tokens, a window of 64) beside the dense formula with the same mask; and
lm/long_context.py (8,192 tokens, a window of 512 and 64 global tokens) beside it, and beside attention that sees all before.
Losses of three steps of sides with the same mask agree to 2e-3 before anything is timed, and those of another mask do not. No
layer begins at zero there, as the configs have it, since attention would not reach the first losses. The tokens are random.
"""

from __future__ import annotations

from research.core.memory import keep_freed_memory

keep_freed_memory()  # as `gnomon train` does, before JAX runs anything

import jax  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.harness import compare, run  # noqa: E402
from research import build, load_config  # noqa: E402
from research.core.loop import compiled, owned  # noqa: E402

NEEDS_PEERS = False
VOCAB = 90  # of lm/stdlib, and less than it has


class Step:
    """A step of a config's first stage from its initial state."""

    def __init__(self, config: str, **values):
        loaded = load_config(config, **values)
        self.program = compiled(build(loaded).stages[0].learner, None)
        self.state = owned(self.program.init(jax.random.key(0), None), self.program.abstract)
        batch, length = loaded.stream.batch, loaded.stream.length
        tokens = np.random.default_rng(0).integers(0, VOCAB, (batch, length + 1)).astype(np.int32)
        stream = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": np.ones((batch, length), np.float32)}
        self.batch = self.program.put({name: np.ascontiguousarray(x)[None] for name, x in stream.items()})

    def __call__(self) -> float:
        self.state, metrics = self.program.step(self.state, self.batch, 1, jax.random.key(1))
        total, weight = jax.device_get(metrics["loss"])
        return float(total[0] / weight[0])


DENSE = {"model__attention__implementation": "reference"}
ALL_BEFORE = {"model__attention__mask": ["full()"]}
NEAR = 2e-3


def losses(config: str, **values) -> np.ndarray:
    step = Step(config, model__zero_init=False, **values)
    return np.array([step() for _ in range(3)])


def agree(config: str) -> None:
    """Raises AssertionError if the dense formula's losses are others, or attention of all before makes no difference."""
    ours, dense, other = (losses(config, **values) for values in ({}, DENSE, ALL_BEFORE))
    np.testing.assert_allclose(dense, ours, atol=NEAR, rtol=0, err_msg=config)
    assert np.abs(other - ours).max() > NEAR, f"{config}: the losses do not depend on the mask"


def main() -> list[dict]:
    stdlib, long = "configs/lm/stdlib.py", "configs/lm/long_context.py"
    rows = []
    for config, others in ((stdlib, {}), (long, {"all before, ours": ALL_BEFORE})):
        agree(config)
        sides = {"ours": {}, **others, "dense formula": DENSE}
        work = f"a step of {config.removeprefix('configs/').removesuffix('.py')}"
        rows.append(compare(work, {name: Step(config, **values) for name, values in sides.items()}))
    return rows


if __name__ == "__main__":
    run(main)
