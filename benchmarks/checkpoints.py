"""What saving in the background costs the steps beside it: the pause, and how much longer steps take until all is on disk.

A transformer with Adam's moments, saved every 8 steps with hashes of all files, beside the same steps without a save, in one
process, round by round.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from benchmarks.harness import run
from research.core.checkpoint import Checkpoints
from research.core.loop import compiled
from research.learners import gradient
from research.models import transformer
from research.tasks import language_model

NEEDS_PEERS = False
ROUNDS, EVERY = 10, 8
MODEL = {
    "vocab": 256, "context": 128, "width": 384, "layers": 4, "heads": 6, "kv_heads": 6, "head_dim": 64,
    "attention": {"mask": ["full()"], "implementation": ""}, "rope_base": 1e4, "qk_norm": 0.0, "mlp": "gelu", "mlp_width": 1536,
    "norm": "rms", "conv": 0, "dropout": 0.0, "ngrams": [], "ngram_bits": 4, "ngram_width": 4, "induction": [], "copy": False,
    "tie_embeddings": False, "embed_scale": 1.0, "embed_norm": False, "zero_init": False, "dtype": "float32",
    "scan_layers": True, "remat": ["none"],
}  # fmt: skip


def timed(step: Callable[[], Any], saving: Callable[[], bool]) -> tuple[list[float], list[bool]]:
    """Seconds of EVERY steps, and whether a save was under way when each ended."""
    times, beside = [], []
    for _ in range(EVERY):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
        beside.append(saving())
    return times, beside


def main() -> list[dict[str, Any]]:
    task = language_model(transformer(**MODEL), batch=4, length=128, label_smoothing=0.0, z_loss=0.0)
    program = compiled(gradient(task, optax.adam(1e-3)), None)
    tokens = np.random.default_rng(0).integers(0, 256, (1, 4, 129)).astype(np.int32)
    batch = {"inputs": tokens[..., :-1], "targets": tokens[..., 1:], "mask": np.ones((1, 4, 128), np.float32)}
    held = {"state": program.init(jax.random.key(0), None)}
    batch, key = program.put(batch), jax.random.key(1)

    def step() -> None:
        held["state"], _ = program.step(held["state"], batch, 1, key)
        jax.block_until_ready(held["state"])

    folder = Path(tempfile.mkdtemp())
    checkpoints = Checkpoints(folder / "checkpoints", keep_latest=1)
    for _ in range(3):
        step()
    plain, beside, after, pauses, saves = [], [], [], [], []
    for i in range(ROUNDS):
        print(f"round {i + 1} of {ROUNDS}", file=sys.stderr, flush=True)
        plain += timed(step, lambda: False)[0]
        began = time.perf_counter()
        checkpoints.save(held["state"])
        pauses.append(time.perf_counter() - began)
        times, under_way = timed(step, lambda: checkpoints.saving)
        beside += [t for t, busy in zip(times, under_way, strict=True) if busy]
        after += [t for t, busy in zip(times, under_way, strict=True) if not busy]
        checkpoints.wait()
        saves.append(time.perf_counter() - began)
    shutil.rmtree(folder)
    usual = statistics.median(plain)
    slow = [t for t in beside if t > 1.1 * usual]
    lost = statistics.median(pauses) + sum(t - usual for t in beside) / ROUNDS  # by one save

    def shown(values: list[float]) -> str:
        return (
            f"{statistics.median(values) * 1e3:.1f} ({min(values) * 1e3:.1f} to {max(values) * 1e3:.1f})" if values else "none"
        )

    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held["state"]))
    facts = {
        "bytes of the State": size,
        "ms a step without a save, median (range)": shown(plain),
        "ms a step while one is written": shown(beside),
        "ms a step after it": shown(after),
        "ms that a save stops the steps": shown(pauses),
        "steps beside a save": len(beside) / ROUNDS,
        "of them longer by a tenth": f"{len(slow) / max(1, len(beside)):.0%}",
        "of all time, lost at a save in 100 steps": f"{lost / (100 * usual):.2%}",
    }
    return [{"work": f"a State of {size / 2**20:.0f} MiB, a save every {EVERY} steps", "facts": {"ours": facts}}]


if __name__ == "__main__":
    run(main)
