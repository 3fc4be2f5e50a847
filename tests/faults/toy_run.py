"""A regression small enough for several processes on one core, and slow enough for a signal to hit a step that is meant.

gnomon launch --processes 2 -- train --config tests/faults/toy_run.py --config.mesh.data=-1
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from research import Experiment
from research.core.mesh import make_layout
from research.core.stall import Stall
from research.core.types import Aux, Example, Method, Spec, Stage, Task
from research.data.streams import train_batches
from research.learners import gradient

ARGS = ("",)
BATCH, RECORDS, WIDTH = 12, 100, 8


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(
        {
            "seed": 0,
            "steps": 63,  # seven epochs
            "every": 5,
            "pause": 0.0,  # seconds that every batch takes
            "stall": {"after": 0.0, "read": 0, "process": 0, "seconds": 0.0},  # who waits, at which of its reads, how long
            "mesh": {"data": -1, "fsdp": 1},
        }
    )


def task() -> Task:
    def init(key):
        params = {"w": jax.random.normal(key, (WIDTH, WIDTH)), "v": jax.random.normal(key, (WIDTH,))}
        return {"params": params, "state": {"seen": jnp.zeros(RECORDS)}, "frozen": {}}

    def predict(variables, inputs, key):
        return jnp.tanh(inputs["inputs"] @ variables["params"]["w"]) @ variables["params"]["v"]

    def loss(variables, batch, key):
        error = (predict(variables, batch, key) - batch["targets"]) ** 2
        weight = batch["mask"].sum()
        total = (error * batch["mask"]).sum()
        seen = variables["state"]["seen"].at[batch["record"]].add(batch["mask"])  # how often each record was trained on
        return total / weight, Aux({"seen": seen}, {"mse": (total, weight)}, weight)

    inputs = Spec((BATCH, WIDTH), jnp.float32, ("batch",))
    row = Spec((BATCH,), jnp.float32, ("batch",))
    record = Spec((BATCH,), jnp.int32, ("batch",))
    batch = {"inputs": inputs, "targets": row, "mask": row, "record": record}
    axes = {"params": {"w": jax.P("embed"), "v": jax.P("embed")}, "state": {"seen": jax.P()}, "frozen": {}}
    return Task(init, loss, {"predict": Method(predict, {"inputs": inputs})}, batch, axes, {"seen": "sum"})


def example() -> Example:
    return Example(task())


class Slow:
    """Records that take their time, and tell who has read them."""

    fingerprint = "slow records"

    def __init__(self, config: ConfigDict):
        self._config = config
        self._reads = 0
        self._inputs = np.random.default_rng(0).normal(size=(RECORDS, WIDTH)).astype(np.float32)

    def __len__(self) -> int:
        return RECORDS

    def gather(self, rows: np.ndarray, epoch: int) -> dict[str, np.ndarray]:
        stall = self._config.stall
        time.sleep(self._config.pause)
        self._reads += 1
        if self._reads == stall.read and jax.process_index() == stall.process:
            time.sleep(stall.seconds)
        return {"inputs": self._inputs[rows], "targets": self._inputs[rows].sum(1), "record": rows.astype(np.int32)}


def build(config: ConfigDict) -> Experiment:
    batches = train_batches(Slow(config), BATCH, seed=config.seed, remainder="pad")
    learner = gradient(task(), optax.adam(1e-2))
    return Experiment(
        [Stage(learner, batches, config.steps)],
        seed=config.seed,
        log_every=5,
        checkpoints={"every": config.every},
        hooks=[Stall(config.stall.after)] if config.stall.after else [],
        mesh=make_layout(config.mesh.to_dict()),
    )
