"""Whether a member keeps its contract, told before anything compiles.

Every check is abstract (shapes and dtypes alone, nothing is computed) and raises `ContractError` with one line: where, the path
in the tree, what was expected, what was got. Errors that a member raises by itself while it is traced pass through.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.core.merge import rule_of
from research.core.names import suggestion
from research.core.tree import Path, joined, leaves_with_paths, map_with_path
from research.core.types import GROUPS, Aux, Estimate, Evaluator, Learner, Method, Spec, Task, TaskFamily, Tree, Variables

CLOSED_OVER_LIMIT = 4 * 2**20  # bytes of one constant in a program; what is larger belongs in "frozen", as an argument


class ContractError(ValueError):
    """A contract of `research.core.types` is broken. One line: where, path, expected, got."""


def _fail(where: str, path: str, expected: Any, got: Any) -> None:
    raise ContractError(f"{where}: {path + ': ' if path else ''}expected {expected}, got {got}")


def described(x: Any) -> str:
    """float32[3,4] for an array or its shape; the type's name, and the value where it is short, for anything else."""
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{x.dtype}[{','.join(map(str, x.shape))}]"
    text = " ".join(repr(x).split())
    return f"{type(x).__name__} {text}" if len(text) <= 60 else type(x).__name__


def abstract_key() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(jax.random.key, 0)


def abstract_batch(specs: Tree, where: str = "batch") -> Tree:
    """ShapeDtypeStructs of a tree of Specs."""

    def one(path: Path, spec: Any) -> jax.ShapeDtypeStruct:
        if not isinstance(spec, Spec):
            _fail(where, joined(path), "a Spec", described(spec))
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype)

    return map_with_path(one, specs)


def check_same(expected: Tree, got: Tree, where: str) -> None:
    """Both trees hold the same paths, shapes, dtypes and containers."""
    want, have = dict(_named(expected)), dict(_named(got))
    for path in have:
        if path not in want:
            _fail(where, path, f"no such leaf{suggestion(path, want.keys() - have.keys())}", described(have[path]))
    for path, x in want.items():
        if path not in have:
            _fail(where, path, described(x), f"nothing{suggestion(path, have)}")
        y = have[path]
        if not hasattr(y, "shape") or tuple(x.shape) != tuple(y.shape) or x.dtype != y.dtype:
            _fail(where, path, described(x), described(y))
    _check_containers(expected, got, where)


def _named(tree: Tree) -> list[tuple[str, Any]]:
    return [(joined(path) or "(root)", x) for path, x in leaves_with_paths(tree)]


def _check_containers(expected: Tree, got: Tree, where: str) -> None:
    want, have = (" ".join(str(jax.tree.structure(t)).split()) for t in (expected, got))
    if want != have:
        _fail(where, "", f"the containers {want[:200]}", have[:200])


def _check_nested(tree: Tree, where: str, path: str) -> None:
    """Nested dicts, str keys, array leaves, no generator."""
    if isinstance(tree, Mapping):
        for name, child in tree.items():
            below = f"{path}/{name}" if path else str(name)
            if not isinstance(name, str):
                _fail(where, below, "a str key", described(name))
            _check_nested(child, where, below)
    elif not (hasattr(tree, "shape") and hasattr(tree, "dtype")):
        _fail(where, path, "nested dicts of arrays", described(tree))
    elif jnp.issubdtype(tree.dtype, jax.dtypes.prng_key):
        _fail(where, path, "an array (a random key is an argument, never kept)", described(tree))


def _check_variables_tree(variables: Any, where: str) -> None:
    if not isinstance(variables, dict) or set(variables) != set(GROUPS):
        got = f"the keys {sorted(map(str, variables))}" if isinstance(variables, dict) else described(variables)
        _fail(where, "", f"a dict with the keys {', '.join(GROUPS)}", got)
    for group in GROUPS:
        if not isinstance(variables[group], dict):
            _fail(where, group, "a dict of arrays", described(variables[group]))
        _check_nested(variables[group], where, group)


def check_axes(axes: Tree, tree: Tree, where: str) -> None:
    """A `jax.P` of at most its rank in str names beside every leaf, in the same containers."""
    want, have = dict(_named(tree)), dict(_named(axes))
    for path in [*have, *want]:
        if path not in want:
            _fail(where, path, f"no such leaf{suggestion(path, want)}", have[path])
        if path not in have:
            _fail(where, path, f"axes of {described(want[path])}", "nothing")
        names = have[path]
        if not isinstance(names, jax.P) or not all(n is None or isinstance(n, str) for n in names):
            _fail(where, path, "a jax.P of logical names", described(names))
        if len(names) > len(want[path].shape):
            _fail(where, path, f"at most {len(want[path].shape)} names", names)
    _check_containers(tree, axes, where)


def check_metrics(metrics: Any, where: str) -> None:
    """{str: (sum, weight)}: numbers, the weight shaped as the sum or a scalar."""
    if not isinstance(metrics, Mapping):
        _fail(where, "", "a dict {name: (sum, weight)}", described(metrics))
    for name, pair in metrics.items():
        if not isinstance(name, str):
            _fail(where, "", "str names", described(name))
        if not isinstance(pair, tuple) or len(pair) != 2 or not all(hasattr(x, "shape") for x in pair):
            _fail(where, name, "a pair (sum, weight)", described(pair))
        if pair[1].shape not in ((), pair[0].shape):
            _fail(where, name, f"a weight of shape () or {pair[0].shape}", described(pair[1]))
        for x in pair:
            if not (jnp.issubdtype(x.dtype, jnp.number) or x.dtype == jnp.bool_):
                _fail(where, name, "numbers", described(x))


def _check_specs(specs: Tree, where: str) -> None:
    abstract_batch(specs, where)
    sizes: dict[int, str] = {}
    for path, spec in leaves_with_paths(specs):
        for name, size in zip(spec.axes, spec.shape):
            if name == "batch":
                sizes.setdefault(size, joined(path))
        if spec.axes.count("batch") > 1:
            _fail(where, joined(path), 'at most one axis named "batch"', spec.axes)
    if len(sizes) > 1:
        (a, first), (b, second) = list(sizes.items())[:2]
        _fail(where, second, f'a "batch" axis of {a}, as {first} has', b)


def _check_methods(methods: Any, variables: Variables, where: str) -> None:
    for name, method in methods.items():
        here = f"{where}.methods[{name!r}]"
        if not isinstance(method, Method):
            _fail(here, "", "a Method", described(method))
        inputs = abstract_batch(method.inputs, f"{here}.inputs")
        jax.eval_shape(method.apply, variables, inputs, abstract_key())


def _is_scalar_float(x: Any) -> bool:
    return hasattr(x, "shape") and x.shape == () and jnp.issubdtype(x.dtype, jnp.floating)


def check_aux(aux: Any, variables: Variables, where: str) -> None:
    if not isinstance(aux, Aux):
        _fail(where, "", "an Aux(state, metrics, weight)", described(aux))
    check_same(variables["state"], aux.state, f"{where}: Aux.state")
    check_metrics(aux.metrics, f"{where}: Aux.metrics")
    if aux.weight is not None and not _is_scalar_float(aux.weight):
        _fail(f"{where}: Aux.weight", "", "a float scalar or None", described(aux.weight))


def abstract_variables(task: Task) -> Variables:
    """ShapeDtypeStructs of `task.init`, checked."""
    variables = jax.eval_shape(task.init, abstract_key())
    _check_variables_tree(variables, "task.init")
    for path, x in leaves_with_paths(variables["params"]):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            _fail("task.init", f"params/{joined(path)}", "floats (others belong in state or frozen)", described(x))
    return variables


def check_task(task: Task | Any, methods: bool = True) -> Variables:
    """`init`, `loss`, `axes`, `merge`, `batch` and (unless `methods` is False) every method keep their contract.

    Returns the abstract variables. Raises ContractError.
    """
    if not isinstance(task, Task):
        _fail("task", "", "a Task", described(task))
    variables = abstract_variables(task)
    if task.axes is not None:
        check_axes(task.axes, variables, "task.axes")
    _check_specs(task.batch, "task.batch")
    paths = {joined(path): x for path, x in leaves_with_paths(variables["state"])}
    for path in task.merge:
        if path not in paths:
            _fail("task.merge", path, f"a path in state{suggestion(path, paths)}", "no such path")
        rule_of(tuple(path.split("/")), paths[path].dtype, task.merge)
    out = jax.eval_shape(task.loss, variables, abstract_batch(task.batch), abstract_key())
    if not isinstance(out, tuple) or len(out) != 2:
        _fail("task.loss", "", "a pair (loss, Aux)", described(out))
    if not _is_scalar_float(out[0]):
        _fail("task.loss", "", "a scalar float loss", described(out[0]))
    check_aux(out[1], variables, "task.loss")
    if methods:
        _check_methods(task.methods, variables, "task")
    return variables


def check_family(family: TaskFamily | Any) -> None:
    """Parameters are arrays, the task of traced ones keeps its contract, and `batch` gives what its Specs say. Raises
    ContractError."""
    if not isinstance(family, TaskFamily):
        _fail("family", "", "a TaskFamily", described(family))
    key = abstract_key()
    parameters = jax.eval_shape(family.sample, key)
    for path, x in leaves_with_paths(parameters):
        if not hasattr(x, "dtype") or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            _fail("family.sample", joined(path), "an array (a random key is an argument, never kept)", described(x))
    _check_nested(family.data, "family", "data")

    def checked(parameters: Tree, data: Tree, key: Any) -> tuple[Tree, Tree]:
        task = family.task(parameters)
        check_task(task)
        check_same(abstract_batch(task.batch), family.batch(parameters, data, key), "family.batch")
        return parameters, key

    jax.eval_shape(checked, parameters, family.data, key)


def check_estimate(estimate: Estimate, task: Task) -> None:
    """On this task: gradients are shaped as params, memory keeps its form, Aux is one. Raises ContractError."""
    variables, key = abstract_variables(task), abstract_key()
    memory = jax.eval_shape(lambda v, k: estimate.init(task, v, k), variables, key)
    batch = abstract_batch(task.batch)
    out = jax.eval_shape(lambda m, v, b, k: estimate.grads(m, task, v, b, k), memory, variables, batch, key)
    if not isinstance(out, tuple) or len(out) != 4:
        _fail("estimate.grads", "", "(loss, Aux, gradients, memory)", described(out))
    loss, aux, grads, new = out
    if not _is_scalar_float(loss):
        _fail("estimate.grads", "", "a scalar float loss", described(loss))
    check_aux(aux, variables, "estimate.grads")
    check_same(variables["params"], grads, "estimate.grads: gradients")
    check_same(memory, new, "estimate.grads: memory")


def _constants(closed: Any) -> Iterator[Any]:
    """The constants of a closed jaxpr and of those within it."""
    yield from closed.consts
    for eqn in closed.jaxpr.eqns:
        for param in eqn.params.values():
            for inner in param if isinstance(param, (tuple, list)) else (param,):
                if hasattr(inner, "jaxpr") and hasattr(inner, "consts"):
                    yield from _constants(inner)


def _untouched(jaxpr: Any, out: Any, given: Any) -> bool:
    """Whether an output is an input itself, through calls of jit as well."""
    if out is given:
        return True
    for eqn in jaxpr.eqns:
        if out in eqn.outvars and eqn.primitive.name in ("jit", "pjit"):
            inner = eqn.params["jaxpr"].jaxpr
            end = inner.outvars[eqn.outvars.index(out)]
            return any(_untouched(inner, end, v) and _untouched(jaxpr, w, given) for v, w in zip(inner.invars, eqn.invars))
    return False


def check_learner(learner: Learner | Any) -> None:
    """`init`, `step`, `variables`, `axes`, `batch` and `methods` keep their contract. Raises ContractError.

    One trace of the step also tells whether "frozen" passes through it by identity, and whether a large array is closed over.
    """
    if not isinstance(learner, Learner):
        _fail("learner", "", "a Learner", described(learner))
    key = abstract_key()
    state = jax.eval_shape(learner.init, key)
    if not isinstance(state, dict) or not {"step", "frozen"} <= set(state):
        got = f"the keys {sorted(map(str, state))}" if isinstance(state, dict) else described(state)
        _fail("learner.init", "", 'a dict with "step" and "frozen"', got)
    step = state["step"]
    if not hasattr(step, "shape") or step.shape != () or step.dtype != jnp.int32:
        _fail("learner.init", "step", "int32[]", described(step))
    _check_nested(state["frozen"], "learner.init", "frozen")
    _check_specs(learner.batch, "learner.batch")
    check_axes(learner.axes, state, "learner.axes")

    args = (state, abstract_batch(learner.batch), key)
    closed, out = jax.make_jaxpr(learner.step, return_shape=True)(*args)
    if not isinstance(out, tuple) or len(out) != 2:
        _fail("learner.step", "", "(State, metrics)", described(out))
    check_same(state, out[0], "learner.step: State")
    check_metrics(out[1], "learner.step: metrics")
    if "loss" not in out[1]:
        _fail("learner.step: metrics", "", 'a "loss"', f"only {', '.join(out[1]) or 'nothing'}")
    for i, (path, x) in enumerate(leaves_with_paths(state)):  # the State comes first in arguments and in outputs
        if path[0] == "frozen" and not _untouched(closed.jaxpr, closed.jaxpr.outvars[i], closed.jaxpr.invars[i]):
            _fail("learner.step: State", joined(path), "the array it was given, untouched", f"another {described(x)}")
    for const in _constants(closed):
        if getattr(const, "nbytes", 0) > CLOSED_OVER_LIMIT:
            _fail("learner.step", "", f"no constant above {CLOSED_OVER_LIMIT} bytes (pass it in frozen)", described(const))

    variables = jax.eval_shape(learner.variables, state)
    _check_variables_tree(variables, "learner.variables")
    check_same(state, jax.eval_shape(learner.init, key, variables), "learner.init with variables: State")
    _check_methods(learner.methods, variables, "learner")


def check_variables(variables: Any, expected: Variables, where: str = "variables") -> None:
    """`variables` are shaped as `expected`: same groups, paths, shapes and dtypes. Raises ContractError."""
    _check_variables_tree(variables, where)
    check_same(expected, variables, where)


def check_batch(batch: Any, specs: Tree, where: str = "batch", leading: int = 0) -> None:
    """A host batch fits its Specs: same paths, NumPy (or jax) arrays of the same dtype and shape, after `leading` further
    dimensions of any size (steps). `where` says in the error where the batch came from. Raises ContractError."""
    want, have = dict(_named(specs)), dict(_named(batch))
    for path in have:
        if path not in want:
            _fail(where, path, f"no such leaf{suggestion(path, want.keys() - have.keys())}", described(have[path]))
    for path, spec in want.items():
        if path not in have:
            _fail(where, path, described(spec), f"nothing{suggestion(path, have)}")
        x = have[path]
        if not isinstance(x, (np.ndarray, np.generic, jax.Array)):
            _fail(where, path, described(spec), described(x))
        if x.ndim < leading or x.shape[leading:] != spec.shape or x.dtype != spec.dtype:
            shape = (*x.shape[:leading], *spec.shape) if x.ndim >= leading else spec.shape
            _fail(where, path, described(jax.ShapeDtypeStruct(shape, spec.dtype)), described(x))


def check_evaluator(evaluator: Evaluator | Any, variables: Variables, batch: Tree) -> None:
    """`init` gives arrays or numbers, and `update` keeps their paths, shapes and dtypes, on `variables` and `batch` (arrays or
    their shapes). Raises ContractError."""
    if not isinstance(evaluator, Evaluator):
        _fail("evaluator", "", "an Evaluator", described(evaluator))
    stats = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, evaluator.init()))
    new = jax.eval_shape(evaluator.update, stats, variables, batch, abstract_key())
    check_same(stats, new, "evaluator.update: stats")
