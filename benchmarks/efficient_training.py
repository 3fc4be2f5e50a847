"""What each switch of efficient training saves and costs, one changed at a time: bytes of the compiled step, seconds a step.

A small `lm/stdlib.py` on one device. Bytes are `memory_analysis` of the compiled step: its temporaries, and all that it holds
at once (arguments, results and temporaries, those in one place counted once). XLA drops optimization barriers when it compiles
for CPUs, so that layers written out are not computed again whatever `model.remat` says: it shows in scanned layers alone, and
both are among the sides. A CPU has no units for bfloat16 products, or few: its time here says nothing of an accelerator's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.harness import compare, run
from configs.lm import stdlib
from research.core.loop import compiled
from research.experiment import build

NEEDS_PEERS = False
CONFIG = "configs/lm/stdlib.py"
SIZE = {"model.width": 128, "model.layers": 8, "model.mlp_width": 512, "model.scan_layers": True, "stream.length": 256}
ACCUMULATED = {"estimate": {"name": "exact", "wrap": ["accumulated"], "accumulated": {"n": 4}}}
NOT_DONATED = "buffers not donated"
SIDES: Mapping[str, Mapping[str, Any]] = {
    "scanned layers, float32": {},
    "remat dots": {"model.remat": ["dots"]},
    "remat weights": {"model.remat": ["weights"]},
    "remat full": {"model.remat": ["full"]},
    "remat full in every second layer": {"model.remat": ["none", "full"]},
    "accumulated 4": ACCUMULATED,
    "bfloat16 products": {"model.dtype": "bfloat16"},
    NOT_DONATED: {},
    "layers written out": {"model.scan_layers": False},
    "layers written out, remat full": {"model.scan_layers": False, "model.remat": ["full"]},
}


class Side(NamedTuple):
    """step: takes one, returns its loss. facts: bytes of the compiled program."""

    step: Callable[[], float]
    facts: Mapping[str, int]


def side(changed: Mapping[str, Any], donated: bool) -> Side:
    config = stdlib.get_config("smoke")
    with config.unlocked():
        for key, value in {**SIZE, **changed}.items():
            config.update_from_flattened_dict({key: value}) if "." in key else config.update({key: value})
    stage = build(config, CONFIG).stages[0]
    program = compiled(stage.learner, None)
    step = program.step if donated else jax.jit(program.step.__wrapped__, static_argnums=2)  # type: ignore[attr-defined]
    key = jax.random.key(1)
    batch = program.put(jax.tree.map(lambda x: x[None], next(stage.batches.open())))
    held = {"state": program.init(jax.random.key(0), None)}
    call = step.lower(held["state"], batch, 1, key).compile()
    memory = call.memory_analysis()
    everything = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    facts = {
        "temporaries, bytes": memory.temp_size_in_bytes,
        "all at once, bytes": everything - memory.alias_size_in_bytes,
    }

    def one() -> float:
        held["state"], metrics = call(held["state"], batch, key)
        total, weight = jax.block_until_ready(metrics["loss"])
        jax.block_until_ready(held["state"])
        return float(total[0] / weight[0])

    return Side(one, facts)


def main() -> list[dict[str, Any]]:
    sides = {}
    for name, changed in SIDES.items():
        print(f"compiling: {name}", flush=True)
        sides[name] = side(changed, name != NOT_DONATED)
    first, *others = [s.step() for s in sides.values()]
    np.testing.assert_allclose(others, first, rtol=1e-2)
    shape = f"width {SIZE['model.width']}, {SIZE['model.layers']} layers, a batch of 8 x {SIZE['stream.length']} bytes"
    row = compare(f"{CONFIG}, {shape}", {name: s.step for name, s in sides.items()})
    return [{**row, "facts": {name: s.facts for name, s in sides.items()}}]


if __name__ == "__main__":
    run(main)
