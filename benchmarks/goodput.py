"""What is left of a run's speed when one of its processes is killed again and again: useful steps a second, restarts included.

`gnomon launch` of two processes of one device, a small transformer, a checkpoint every 20 steps. Process 1 kills itself with
SIGKILL 50 steps after each start; the launcher starts all again, and what was trained since the last checkpoint is done anew.
Useful steps are those of the finished run, each counted once; the time is that of the whole command, from its start to its end,
compiling included. Beside it the same command without a kill, before and after. The config that is trained is this file, too.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import optax
from ml_collections import ConfigDict

from benchmarks.harness import run
from research import Experiment
from research.core import processes
from research.core.batches import from_function
from research.core.hooks import Hook
from research.core.mesh import make_layout
from research.core.types import Learner, Stage
from research.learners import gradient
from research.models import transformer
from research.tasks import language_model

NEEDS_PEERS = False
STEPS, SAVE_EVERY, KILL_AFTER = 200, 20, 50
BATCH, LENGTH = 8, 128
MODEL = {
    "vocab": 256, "context": LENGTH, "width": 128, "layers": 4, "heads": 4, "kv_heads": 4, "head_dim": 32,
    "attention": {"mask": ["full()"], "implementation": ""}, "rope_base": 1e4, "qk_norm": 0.0, "mlp": "gelu", "mlp_width": 512,
    "norm": "rms", "conv": 0, "dropout": 0.0, "ngrams": [], "ngram_bits": 4, "ngram_width": 4, "induction": [], "copy": False,
    "tie_embeddings": False, "embed_scale": 1.0, "embed_norm": False, "zero_init": False, "dtype": "float32",
    "scan_layers": True, "remat": ["none"],
}  # fmt: skip


class Mortal(Hook):
    """Kills process 1 so many steps after each start, 0: never. It writes down when it did, process 0 when steps began."""

    def __init__(self, kill_after: int, told: str):
        self._kill_after, self._told = kill_after, told
        self._first = self._last = -1

    def start(self, step: int, steps: int, learner: Learner, stage: int = 0) -> None:
        self._first, self._last = step + 1, step + self._kill_after

    def step(self, step: int) -> None:
        if step == self._first and processes.index() == 0:
            self._tell("begun", step)

    def log(self, step: int, metrics: Any) -> None:
        if step == self._last and self._kill_after and processes.index() == 1:
            self._tell("killed", step)
            os.kill(os.getpid(), signal.SIGKILL)

    def _tell(self, what: str, step: int) -> None:
        with open(self._told, "a") as out:
            out.write(f"{what} {step} {time.time()}\n")


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(
        {"seed": 0, "steps": STEPS, "log_every": 5, "save_every": SAVE_EVERY, "kill_after": 0, "told": os.devnull}
    )


def batch(i: int) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(i).integers(0, 256, (BATCH, LENGTH + 1)).astype(np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": np.ones((BATCH, LENGTH), np.float32)}


def build(config: ConfigDict) -> Experiment:
    task = language_model(transformer(**MODEL), batch=BATCH, length=LENGTH, label_smoothing=0.0, z_loss=0.0)
    return Experiment(
        [Stage(gradient(task, optax.adam(1e-3)), from_function(batch, fingerprint="random tokens"), config.steps)],
        seed=config.seed,
        log_every=config.log_every,
        checkpoints={"every": config.save_every},
        hooks=[Mortal(config.kill_after, config.told)],
        mesh=make_layout({"fsdp": -1}),
    )


def trained(folder: Path, name: str, kill_after: int) -> dict[str, Any]:
    """Runs the command to its end; what it came to."""
    print(f"{time.strftime('%X')} {name}", file=sys.stderr, flush=True)
    told = folder / f"{name}.txt"
    launch = [sys.executable, "-m", "research", "launch", "--processes", "2", "--heartbeat", "10", "--restarts", "20"]
    given = [f"--config.kill_after={kill_after}", f"--config.told={told}"]
    train = ["train", "--config", __file__, "--workdir", str(folder / name), *given]
    began = time.time()
    done = subprocess.run([*launch, "--", *train], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    wall = time.time() - began
    if done.returncode:
        raise RuntimeError(done.stdout)
    lines = [(what, int(step), float(at)) for what, step, at in (line.split() for line in told.read_text().splitlines())]
    facts = {"seconds": round(wall, 1), "useful steps a second": round(STEPS / wall, 2)}
    if not kill_after:
        return facts
    pairs = [(a, b) for a, b in zip(lines, lines[1:], strict=False) if a[0] == "killed"]
    pauses = [again[2] - killed[2] for killed, again in pairs]
    shown = f"{statistics.median(pauses):.1f} ({min(pauses):.1f} to {max(pauses):.1f})"
    return facts | {
        "kills": len(pairs),
        "steps taken again, a kill": statistics.mean(killed[1] + 1 - again[1] for killed, again in pairs),
        "seconds from a kill to the first step after it": shown,
    }


def main() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = {
            "no kill": trained(folder, "before", 0),
            f"a kill {KILL_AFTER} steps after each start": trained(folder, "killed", KILL_AFTER),
            "no kill, again": trained(folder, "after", 0),
        }
    first, killed, last = runs.values()
    best = statistics.mean(run["useful steps a second"] for run in (first, last))
    killed["of the best possible, the speed without kills"] = f"{killed['useful steps a second'] / best:.0%}"
    return [{"work": f"{STEPS} steps in 2 processes, a checkpoint every {SAVE_EVERY}", "facts": runs}]


if __name__ == "__main__":
    run(main)
