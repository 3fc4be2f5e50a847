"""A training step of two configs, with the attention they have beside others: what sparse attention is worth in a whole model.

The main job (lm/stdlib.py: 2 x 2,048 tokens, a window of 64) beside the dense formula with the same mask; and
lm/long_context.py (8,192 tokens, a window of 512 and 64 global tokens) beside it, and beside attention that sees all before.
Losses of sides with the same mask agree to 1e-3, half of bfloat16's step, before anything is timed. The tokens are random.
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


def row(work: str, sides: dict[str, Step], same: tuple[str, ...]) -> dict:
    losses = {name: side() for name, side in sides.items()}
    for name in same:
        np.testing.assert_allclose(losses[name], losses["ours"], atol=1e-3, err_msg=f"{work}: {name}")
    return compare(work, sides)


def main() -> list[dict]:
    dense = {"model__attention__implementation": "reference"}
    stdlib, long = "configs/lm/stdlib.py", "configs/lm/long_context.py"
    sides = {"ours": Step(stdlib), "dense formula": Step(stdlib, **dense)}
    rows = [row("a step of lm/stdlib", sides, same=("dense formula",))]
    all_before = Step(long, model__attention__mask=["full()"])
    sides = {"ours": Step(long), "all before, ours": all_before, "dense formula": Step(long, **dense)}
    return [*rows, row("a step of lm/long_context", sides, same=("dense formula",))]


if __name__ == "__main__":
    run(main)
