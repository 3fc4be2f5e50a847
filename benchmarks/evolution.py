"""Generations of evolution strategies beside evosax's: the same samples, settings and losses, on one device.

OpenAI-ES, CMA-ES and SNES on a quadratic bowl of 100 dimensions, 64 samples, and OpenAI-ES on an MLP of 6,720 weights, 128
samples. Ours is `learners.evolution`, evosax is asked and told as its examples do; both scan GENERATIONS generations in one
program. Both get the same keys, and draw the same samples from them: the best losses of the first CHECKED generations agree to
1e-3 before anything is timed. CMA-ES's samples depend on a basis of eigenvectors, of which a covariance near the identity has
many: there the first generation agrees, and the mean over SEEDS seeds of the logarithm of the last best loss to APART, three
standard errors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from evosax.algorithms import CMA_ES, SNES, Open_ES

from benchmarks.harness import compare, run
from research.core.types import Aux, Method, Spec, Task
from research.learners import evolution
from research.optim.strategies import Strategy, cma_es, open_es, snes

NEEDS_PEERS = True
GENERATIONS, CHECKED, ROUNDS = 200, 30, 12
SEEDS, APART = 16, 0.5  # of CMA-ES; the logarithm of its last loss has a standard deviation of 0.5 over seeds
KEY = jax.random.key(0)


def task_of(init: Callable[[], Any], loss: Callable[[Any], jax.Array]) -> Task:
    inputs = {"x": Spec((1,), jnp.float32, ("batch",))}
    return Task(
        lambda key: {"params": init(), "state": {}, "frozen": {}},
        lambda variables, batch, key: (loss(variables["params"]), Aux({}, {}, None)),
        {"predict": Method(lambda variables, inputs, key: inputs["x"], inputs)},
        inputs,
    )


def bowl(d: int) -> Task:
    scales = jnp.geomspace(1.0, 100.0, d)
    return task_of(lambda: {"x": jnp.zeros(d)}, lambda params: (scales * (params["x"] - 1) ** 2).sum())


def mlp(features: int, width: int, rows: int) -> Task:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((rows, features)), jnp.float32)
    y = jnp.asarray(np.sin(x[:, 0] * 2) + np.asarray(x[:, 1] * x[:, 2]), jnp.float32)

    def init():
        def normal(*shape):
            return jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), jnp.float32)

        return {"a": normal(features, width), "b": normal(width, width), "c": normal(width, 1)}

    start = init()
    return task_of(
        lambda: start,
        lambda p: ((jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"] - y[:, None]) ** 2).mean(),
    )


def ours(task: Task, strategy: Strategy, generations: int) -> Callable[[], np.ndarray]:
    """A function that runs from the start and gives the best loss of each generation."""
    learner = evolution(task, strategy)
    start = jax.jit(learner.init)(KEY)
    batch = {"x": jnp.zeros(1)}

    @jax.jit
    def scanned(state, keys):
        def body(state, key):
            state, metrics = learner.step(state, batch, key)
            return state, metrics["loss_best"][0]

        return jax.lax.scan(body, state, keys)[1]

    return lambda seed=0: np.asarray(scanned(start, jax.random.split(jax.random.key(seed), generations)))


def theirs(task: Task, make: Callable[..., Any], sigma: float, generations: int) -> Callable[[], np.ndarray]:
    params = task.init(KEY)["params"]
    algorithm = make(solution=params)
    settings = algorithm.default_params
    settings = settings.replace(std_init=jnp.asarray(sigma)) if hasattr(settings, "std_init") else settings
    start = algorithm.init(KEY, params, settings)

    @jax.jit
    def scanned(state, keys):
        def body(state, key):
            k_ask, k_tell = jax.random.split(key)  # ours draws its samples from the first half of the key, too
            population, state = algorithm.ask(k_ask, state, settings)
            losses = jax.vmap(lambda p: task.loss({"params": p, "state": {}, "frozen": {}}, {}, k_tell)[0])(population)
            state, _ = algorithm.tell(k_tell, population, losses, state, settings)
            return state, losses.min()

        return jax.lax.scan(body, state, keys)[1]

    return lambda seed=0: np.asarray(scanned(start, jax.random.split(jax.random.key(seed), generations)))


def cases() -> dict[str, tuple[Task, Strategy, Callable[..., Any], float]]:
    small, large = bowl(100), mlp(40, 64, 100)

    def adam():
        return optax.adam(0.05)

    def open_of(n: int, sigma: float):
        made = partial(Open_ES, population_size=n, optimizer=adam(), std_schedule=optax.constant_schedule(sigma))
        return open_es(n, sigma, adam()), made, sigma

    return {
        "OpenAI-ES, 100 dimensions, 64 samples": (small, *open_of(64, 0.1)),
        "CMA-ES, 100 dimensions, 64 samples": (small, cma_es(64, 0.5), partial(CMA_ES, population_size=64), 0.5),
        "SNES, 100 dimensions, 64 samples": (small, snes(64, 0.5), partial(SNES, population_size=64), 0.5),
        "OpenAI-ES, an MLP of 6,720 weights, 128 samples": (large, *open_of(128, 0.05)),
    }


def main() -> list[dict[str, Any]]:
    rows = []
    for name, (task, strategy, make, sigma) in cases().items():
        sides = {"ours": ours(task, strategy, GENERATIONS), "evosax": theirs(task, make, sigma, GENERATIONS)}
        whole = not name.startswith("CMA-ES")
        ends = []
        for seed in range(2 if whole else SEEDS):
            mine, peer = (side(seed) for side in sides.values())
            same = CHECKED if whole else 1
            np.testing.assert_allclose(mine[:same], peer[:same], rtol=1e-3, err_msg=name)
            assert mine[-1] < 0.9 * mine[0], name
            ends.append((mine[-1], peer[-1]))
        best = dict(zip(sides, np.exp(np.log(ends).mean(0))))
        assert abs(np.log(best["ours"] / best["evosax"])) < APART, f"{name}: {best}"
        row = compare(f"{name}, {GENERATIONS} generations", sides, rounds=ROUNDS)
        row["generations_per_second"] = {side: GENERATIONS / found["median"] for side, found in row["sides"].items()}
        row["best_loss"] = {side: float(loss) for side, loss in best.items()}
        rows.append(row)
    return rows


if __name__ == "__main__":
    run(main)
