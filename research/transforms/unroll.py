"""The training of an inner problem as a Task: its params are those of the optimizer that trains it."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from research.core.axes import replicated
from research.core.contracts import abstract_key, check_family
from research.core.types import (
    Array,
    Aux,
    Batch,
    Example,
    Key,
    LearnedOptimizer,
    Method,
    Spec,
    Task,
    TaskFamily,
    Tree,
    Variables,
)
from research.transforms._inner_loop import Inner, inner_loop
from research.transforms._trees import packed, unpacked

Loss = Callable[[Array], Array]


def unroll(
    family: TaskFamily, learned: LearnedOptimizer, length: int, *, horizon: int | None = None, highest: float | None = None
) -> Task:
    """`length` steps of an inner problem of `family` under the optimizer that `learned` makes of theta.

    Variables: params is theta; state is the inner problem as it stands: "problem" (its parameters, from `family.sample`),
    "inner" (its own Variables), "opt" (the optimizer's state, by path), "t" int32, the steps taken; frozen is `family.data`,
    one copy however many problems an estimate keeps. `init` draws a fresh problem; when one ends and the next begins is the
    estimate's to say (`truncated`, `pes`, …), which resets state from `init`.

    loss: the mean over the steps of the inner loss, each on a batch of its own and before its update, so that what the last
    update is worth shows in the next truncation. metrics: "final", the last of them. Its batch is {} (`core.batches.nothing`)
    and Aux.weight None: it is a mean over what is drawn. The steps scan, so 1 and 1000 compile alike.

    highest: a loss above it, or one that is not finite, counts as it and has no gradient, so that a problem that blew up is as
    bad as this and no worse. None: losses as they are.

    Method "predict": {"loss": float32 [horizon]}, the losses of a fresh problem from its first step; horizon is `length` unless
    it is given. It has no inputs; its key is which problem.

    Raises ValueError (one line): length or horizon below 1, `highest` not finite, `learned` no LearnedOptimizer.
    ContractError: a family that breaks its contract.
    """
    horizon = length if horizon is None else horizon
    for name, value in {"length": length, "horizon": horizon}.items():
        if value < 1:
            raise ValueError(f"unroll: {name}={value}; allowed: 1 or more")
    if highest is not None and not math.isfinite(highest):
        raise ValueError(f"unroll: highest={highest}; allowed: a finite loss, or None")
    if not isinstance(learned, LearnedOptimizer):
        raise ValueError(
            f"unroll: learned is a {type(learned).__name__}; allowed: a LearnedOptimizer, such as learned_scales() of "
            "research.optim.learned"
        )
    check_family(family)
    bounded = _bounded(highest)

    def init(key: Key) -> Variables:
        k_theta, k_problem = jax.random.split(key)
        theta = learned.init(k_theta)
        state = fresh(family, learned.transformation(theta), k_problem)
        return {"params": theta, "state": state, "frozen": jax.tree.map(jnp.asarray, family.data)}

    def loss(variables: Variables, batch: Batch, key: Key) -> tuple[Array, Aux]:
        tx = learned.transformation(variables["params"])
        state, losses = stepped(family, tx, variables["frozen"], variables["state"], key, length, bounded)
        return losses.mean(), Aux(state, {"final": (losses[-1], jnp.ones_like(losses[-1]))}, None)

    def predict(variables: Variables, inputs: Tree, key: Key) -> Tree:
        k_problem, k_steps = jax.random.split(key)
        tx = learned.transformation(variables["params"])
        state = fresh(family, tx, k_problem)
        _, losses = stepped(family, tx, variables["frozen"], state, k_steps, horizon, bounded)
        return {"loss": losses.astype(jnp.float32)}

    axes = replicated(jax.eval_shape(init, abstract_key()))
    return Task(init, loss, {"predict": Method(predict, {})}, {}, axes)


def fresh(family: TaskFamily, tx: optax.GradientTransformation, key: Key) -> Tree:
    """A problem of the family before its first step: {"problem", "inner", "opt", "t"}."""
    k_sample, k_init = jax.random.split(key)
    problem = family.sample(k_sample)
    inner = family.task(problem).init(k_init)
    return {"problem": problem, "inner": inner, **packed(tx.init(inner["params"])), "t": jnp.zeros((), jnp.int32)}


def stepped(
    family: TaskFamily,
    tx: optax.GradientTransformation,
    data: Tree,
    state: Tree,
    key: Key,
    steps: int,
    bounded: Loss = lambda value: value,
) -> tuple[Tree, Array]:
    """(state after `steps` steps of `tx`, losses [steps]), from a state as `fresh` gives it."""
    task, inner = family.task(state["problem"]), state["inner"]
    like = jax.eval_shape(tx.init, inner["params"])

    def loss(params: Tree, task_state: Tree, step: Array, key: Key) -> tuple[Array, Aux]:
        k_batch, k_loss = jax.random.split(key)
        batch = family.batch(state["problem"], data, k_batch)
        value, aux = task.loss({**inner, "params": params, "state": task_state}, batch, k_loss)
        return bounded(value), aux

    start = Inner(inner["params"], inner["state"], unpacked(state.get("opt", {}), like))
    ended, losses = inner_loop(loss, tx, start, lambda step: step, key, range(steps))
    inner = {**inner, "params": ended.params, "state": ended.state}
    return {**state, "inner": inner, **packed(ended.opt), "t": state["t"] + steps}, losses


def _bounded(highest: float | None) -> Loss:
    if highest is None:
        return lambda value: value
    return lambda value: jnp.where(value <= highest, value, jnp.asarray(highest, value.dtype))  # NaN is not <= anything


def example() -> Example:
    """Training a line on a target drawn anew for each problem, by a learned rate."""

    def task(problem: Tree) -> Task:
        def loss(variables: Variables, batch: Batch, key: Key) -> tuple[Array, Aux]:
            error = batch["inputs"] @ (variables["params"]["w"] - problem["target"])
            return (error**2).mean(), Aux(variables["state"], {}, jnp.asarray(error.shape[0], error.dtype))

        specs = {"inputs": Spec((4, 3), jnp.float32, ("batch", None))}
        return Task(lambda key: {"params": {"w": jnp.zeros(3)}, "state": {}, "frozen": {}}, loss, {}, specs)

    def transformation(theta: Tree) -> optax.GradientTransformation:
        return optax.chain(optax.trace(0.5), optax.scale(-jnp.exp(theta["log_rate"])))

    family = TaskFamily(
        lambda key: {"target": jax.random.normal(key, (3,))},
        task,
        lambda problem, data, key: {"inputs": data["scale"][None] * jax.random.normal(key, (4, 3))},
        {"scale": jnp.linspace(0.5, 1.5, 3)},
    )
    learned = LearnedOptimizer(lambda key: {"log_rate": jnp.full((), -3.0)}, transformation)
    return Example(unroll(family, learned, 5, horizon=8))
