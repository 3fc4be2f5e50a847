"""What every transform shares that adapts to a support before it is asked about a query."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.core.contracts import abstract_variables
from research.core.names import choose, suggestion
from research.core.tree import joined, leaves_with_paths, map_with_path
from research.core.types import Array, Aux, Batch, Key, Method, Spec, Task, Tree, Variables
from research.transforms._inner_loop import always, begin, inner_loop
from research.transforms._trees import nested_axis

ORDERS = {"second": "through the inner gradients", "first": "as if the inner gradients were constants"}
Adapt = Callable[[Variables, Batch, Key], tuple[Variables, Array]]  # (variables, support, key) -> (the task's, inner losses)


class Adapting(NamedTuple):
    """What adapts. start: params -> where it begins; whole: (params, what has adapted) -> params of the task; tx: params -> how
    it moves. `params` are those of the transformed task."""

    start: Callable[[Tree], Tree]
    whole: Callable[[Tree, Tree], Tree]
    tx: Callable[[Tree], optax.GradientTransformation]


def check_steps(who: str, steps: int, order: str = "second", truncation: int | None = None) -> range:
    """The last steps, through whose gradients the outer one passes. Raises ValueError (one line) for what cannot be."""
    if steps < 1:
        raise ValueError(f"{who}: steps={steps}; allowed: 1 or more")
    choose(ORDERS, order, f"{who}: order")
    if truncation is not None and (order == "first" or not 1 <= truncation <= steps):
        raise ValueError(f"{who}: truncation={truncation}; allowed: 1 to steps={steps} of the second order, or None")
    return range(steps) if order == "second" and truncation is None else range(steps - (truncation or 0), steps)


def check_optimizer(who: str, tx: Any) -> None:
    """ValueError (one line) for what is no optax transformation, such as a learning rate."""
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise ValueError(f"{who}: inner_tx={tx!r}; allowed: an optax transformation, such as optax.sgd(0.01)")


def by_gradient(task: Task, adapting: Adapting, steps: int, through: range) -> Adapt:
    """`steps` steps of the task's loss on the support; the outer gradient passes through the inner ones of `through`, the last
    of them, and takes those before as constants."""

    def adapt(variables: Variables, support: Batch, key: Key) -> tuple[Variables, Array]:
        params, frozen = variables["params"], variables["frozen"]

        def loss(moving: Tree, state: Tree, batch: Batch, key: Key) -> tuple[Array, Aux]:
            return task.loss({"params": adapting.whole(params, moving), "state": state, "frozen": frozen}, batch, key)

        tx, batch = adapting.tx(params), always(support)
        inner = begin(tx, adapting.start(params), variables["state"])
        inner, first = inner_loop(loss, tx, inner, batch, key, range(through.start), detach=True)
        inner, last = inner_loop(loss, tx, inner, batch, key, through)
        whole = adapting.whole(params, inner.params)
        return {"params": whole, "state": inner.state, "frozen": frozen}, jnp.concatenate([first, last])

    return adapt


def sized(specs: Tree, rows: int | None) -> Tree:
    """Specs whose "batch" axis has `rows`, or as many as before where that is None, called "inner_batch"."""

    def one(spec: Spec) -> Spec:
        shape = (rows if rows and name == "batch" else size for size, name in zip(spec.shape, spec.axes))
        return Spec(tuple(shape), spec.dtype, tuple(map(nested_axis, spec.axes)))

    return jax.tree.map(one, specs)


def episodic(task: Task, adapt: Adapt, support: int | None, *, who: str) -> Task:
    """The task after `adapt`: its batch is {"support", "query"}, both as the task's, the loss that of the query.

    Aux.weight is the query's, which an estimate may split; every part then adapts to the whole support. Metrics are the
    query's, and "support_loss", the last inner one. The state is that of the support, then of the query; copies of it are
    merged by `Task.merge`. Methods are the task's on {"support", "query"}, and "adapt": {"support"} -> {"params", "losses"
    [steps], before each}.
    """
    if support is not None and support < 1:
        raise ValueError(f"{who}: support={support}; allowed: 1 or more, or None for the task's own batch")
    specs = sized(task.batch, support)

    def loss(variables: Variables, batch: Batch, key: Key) -> tuple[Array, Aux]:
        k_support, k_query = jax.random.split(key)
        adapted, losses = adapt(variables, batch["support"], k_support)
        value, aux = task.loss(adapted, batch["query"], k_query)
        weight = jnp.ones_like(value) if aux.weight is None else aux.weight
        return value, aux._replace(metrics={**aux.metrics, "support_loss": (losses[-1] * weight, weight)})

    def lifted(method: Method) -> Method:
        def apply(variables: Variables, inputs: Tree, key: Key) -> Tree:
            k_support, k_query = jax.random.split(key)
            return method.apply(adapt(variables, inputs["support"], k_support)[0], inputs["query"], k_query)

        return Method(apply, {"support": specs, "query": method.inputs})

    def adapted(variables: Variables, inputs: Tree, key: Key) -> Tree:
        found, losses = adapt(variables, inputs["support"], jax.random.split(key)[0])
        return {"params": found["params"], "losses": losses}

    methods = {name: lifted(method) for name, method in task.methods.items()}
    methods["adapt"] = Method(adapted, {"support": specs})
    return task._replace(loss=loss, methods=methods, batch={"support": specs, "query": task.batch})


def chosen(task: Task, pattern: str, who: str) -> tuple[Callable[[Tree], Tree], Callable[[Tree, Tree], Tree]]:
    """(start, whole) of the leaves of params in whose path `pattern` is found. Raises ValueError (one line) for a pattern that
    is no regular expression or is in no path."""
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{who}: adapts={pattern!r} is no regular expression: {error}") from None
    paths = [joined(path) for path, _ in leaves_with_paths(abstract_variables(task)["params"])]
    names = [path for path in paths if found.search(path)]
    if not names:
        raise ValueError(f"{who}: adapts={pattern!r} is in no path of params; they are {', '.join(paths[:8])}"
                         f"{suggestion(pattern, paths)}")  # fmt: skip

    def start(params: Tree) -> Tree:
        return {joined(path): x for path, x in leaves_with_paths(params) if joined(path) in names}

    def whole(params: Tree, moving: Tree) -> Tree:
        return map_with_path(lambda path, x: moving.get(joined(path), x), params)

    return start, whole
