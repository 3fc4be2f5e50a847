"""Sine MAML meta-steps a second, 25 tasks: ours, and two peers in PyTorch, `higher` and `torch.func`.

A meta-step is that of Finn et al. 2017 (arXiv 1703.03400, section 5.1): an MLP of 40, 40, one inner step of 0.01 on 10 points
of each of 25 sinusoids, the gradient to second order of the mean loss on 10 others, a step of Adam at 0.001. All sides are
given the same batches and the same params; their losses over the first meta-steps are compared before anything is timed. Ours
is the step as `fit` compiles it, 1,000 a call, and of one a call; `higher` takes tasks one by one, as its examples do,
`torch.func` all at once by vmap.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from benchmarks.harness import compare, run
from research.core.loop import compiled
from research.learners import gradient
from research.tasks.families import episodes, sinusoids
from research.transforms import maml, over_tasks

NEEDS_PEERS = True
TASKS, POINTS, INNER, OUTER = 25, 10, 0.01, 1e-3
CHECKED, STEPS = 5, 1000  # meta-steps compared; meta-steps of ours in one call
PEERS = {"higher": 10, "torch.func": 50}  # meta-steps that are timed at once: each call takes tens to hundreds of ms
PARTS = ("support", "query")


def batches(n: int) -> Any:
    """{"support", "query"}: leaves [n, TASKS, POINTS, ...], NumPy."""
    family = sinusoids(POINTS)
    draw = jax.jit(jax.vmap(lambda key: episodes(family, TASKS, POINTS, POINTS)({}, key)))
    return jax.tree.map(np.asarray, draw(jax.random.split(jax.random.key(0), n)))


def ours(given: Any) -> tuple[list[float], dict[str, Callable[[], Any]], dict[str, np.ndarray]]:
    """(losses of the first meta-steps, {side: one call}, params at the start)."""
    family = sinusoids(POINTS)
    task = family.task(family.sample(jax.random.key(0)))
    program = compiled(gradient(over_tasks(maml(task, optax.sgd(INNER)), TASKS), optax.adam(OUTER)), None)
    start, key = program.init(jax.random.key(1), None), jax.random.key(2)
    params = {"/".join(str(k.key) for k in path): np.asarray(x) for path, x in jax.tree.leaves_with_path(start["params"])}
    device = jax.device_put(given)
    _, seen = program.step(jax.tree.map(jax.numpy.copy, start), jax.tree.map(lambda x: x[:CHECKED], device), CHECKED, key)
    losses = (np.asarray(seen["loss"][0]) / np.asarray(seen["loss"][1])).tolist()

    def side(length: int) -> Callable[[], Any]:
        piece = jax.tree.map(lambda x: x[:length], device)
        state = [jax.tree.map(jax.numpy.copy, start)]

        def call() -> Any:
            for _ in range(STEPS // length):
                state[0], _ = program.step(state[0], piece, length, key)
            return jax.block_until_ready(state[0])

        return call

    return losses, {f"ours, {STEPS} a call": side(STEPS), "ours, 1 a call": side(1)}, params


def network(params: dict[str, np.ndarray]) -> Any:
    import torch

    layers = []
    for name in ("layers/0", "layers/1", "head"):
        kernel, bias = (torch.tensor(params[f"{name}/{leaf}"]) for leaf in ("kernel", "bias"))
        linear = torch.nn.Linear(*kernel.shape)
        linear.weight.data, linear.bias.data = kernel.T.contiguous(), bias
        layers += [linear, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def with_higher(model: Any, optimizer: Any, batch: Any) -> float:
    import higher
    import torch

    inner = torch.optim.SGD(model.parameters(), lr=INNER)
    optimizer.zero_grad()
    total = 0.0
    for i in range(TASKS):
        with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (fast, moving):
            (xs, ys), (xq, yq) = ((batch[p]["inputs"][i], batch[p]["targets"][i]) for p in PARTS)
            moving.step(torch.nn.functional.mse_loss(fast(xs), ys))
            loss = torch.nn.functional.mse_loss(fast(xq), yq) / TASKS
            loss.backward()
            total += float(loss.detach())
    optimizer.step()
    return total


def with_func(model: Any) -> Callable[[Any, Any, Any], float]:
    import torch
    from torch.func import functional_call, grad, vmap

    def loss(params: Any, x: Any, y: Any) -> Any:
        return torch.nn.functional.mse_loss(functional_call(model, params, (x,)), y)

    def query_loss(params: Any, xs: Any, ys: Any, xq: Any, yq: Any) -> Any:
        grads = grad(loss)(params, xs, ys)
        return loss({name: p - INNER * grads[name] for name, p in params.items()}, xq, yq)

    many = vmap(query_loss, (None, 0, 0, 0, 0))

    def step(model: Any, optimizer: Any, batch: Any) -> float:
        optimizer.zero_grad()
        value = many(dict(model.named_parameters()), *(batch[p][leaf] for p in PARTS for leaf in ("inputs", "targets"))).mean()
        value.backward()
        optimizer.step()
        return float(value.detach())

    return step


def peer(name: str, params: dict[str, np.ndarray], given: Any) -> tuple[list[float], Callable[[], Any]]:
    """(losses of the first meta-steps, one call of PEERS[name] meta-steps)."""
    import torch

    model = network(params)
    step = with_higher if name == "higher" else with_func(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=OUTER)
    whole = jax.tree.map(lambda x: torch.tensor(x[: max(CHECKED, PEERS[name])]), given)
    each = [jax.tree.map(lambda x: x[i], whole) for i in range(max(CHECKED, PEERS[name]))]  # noqa: B023
    losses = [step(model, optimizer, batch) for batch in each[:CHECKED]]

    def call() -> None:
        for batch in each[: PEERS[name]]:
            step(model, optimizer, batch)

    return losses, call


def main() -> list[dict[str, Any]]:
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as many as jax has
    given = batches(STEPS)
    wanted, sides, params = ours(given)
    counts = dict.fromkeys(sides, STEPS)
    for name in PEERS:
        losses, sides[name] = peer(name, params, given)
        np.testing.assert_allclose(losses, wanted, rtol=1e-4)
        counts[name] = PEERS[name]
        print(f"{time.strftime('%X')} losses of {CHECKED} meta-steps agree with {name}", flush=True)
    row = compare(f"sine MAML, {TASKS} tasks, one meta-step", sides, pause=0.1)
    for name, taken in row["sides"].items():  # seconds a meta-step, however many were timed at once
        taken.update({key: taken[key] / counts[name] for key in ("median", "min", "max")})
    return [row]


if __name__ == "__main__":
    run(main)
