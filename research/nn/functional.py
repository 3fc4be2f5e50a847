"""NNX modules as pure functions on plain nested dicts.

A module is written with `flax.nnx`; `functional` turns it into `(init, apply, axes, ask)`, and nothing of NNX passes out: no
module crosses a jit boundary, no random generator is among the variables. Params name their axes as plain metadata, by
`param`: `nnx.with_partitioning` would shard eagerly and fails under `jax.set_mesh`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from research.core import tree
from research.core.types import Key, Tree, Variables

AXES = "logical"  # the metadata key that holds a variable's logical axis names


def param(value: jax.Array, *axes: str | None) -> nnx.Param:
    """A parameter whose dimensions carry logical names, such as `param(kernel, "embed", "mlp")`."""
    return nnx.Param(value, **{AXES: axes})


class Layer(nnx.Module):
    """A module whose operations carry its place in the network, such as "blocks/1/attention/query", in what the compiler and a
    diagnosis of NaN show. Its `__call__` is wrapped for that; `functional` sets the place."""

    scope = ""  # from the layer around it

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__call__" in vars(cls):
            cls.__call__ = _scoped(cls.__call__)


def _scoped(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def within(self: Layer, *args: Any, **kwargs: Any) -> Any:
        with jax.named_scope(self.scope) if self.scope else contextlib.nullcontext():
            return call(self, *args, **kwargs)

    return within


def _set_scopes(module: nnx.Module) -> None:
    layers = {path: node for path, node in nnx.iter_graph(module) if isinstance(node, Layer)}
    for path, layer in layers.items():
        around = max((len(p) for p in layers if len(p) < len(path) and path[: len(p)] == p), default=0)
        layer.scope = "/".join(map(str, path[around:]))


class Functional(NamedTuple):
    """A network as pure functions.

    init: key -> Variables, params and state as nested dicts by the path of the attribute; "frozen" is empty.
    apply: (variables, *args, key=None, train=False, method="__call__") -> (output, new state). With train=False the module is
    in
        evaluation mode: dropout off, batch norm on its running statistics. `key` is what the module's generators draw from; it
        may be missing only where train=False or where the module has no generator (else ValueError).
    axes: Variables of jax.P, of logical names.
    ask: (method, *args) -> what that method of the module returns, called on shapes alone: static facts such as the Specs of a
    cache.
    """

    init: Callable[[Key], Variables]
    apply: Callable[..., tuple[Any, Tree]]
    axes: Tree
    ask: Callable[..., Any]


class _Parts(NamedTuple):
    """What `nnx.split` gives, each as [(path, abstract variable)]."""

    graphdef: Any
    params: list[tuple[Any, Any]]
    generators: list[tuple[Any, Any]]
    state: list[tuple[Any, Any]]


def _split(module: nnx.Module) -> _Parts:
    graphdef, *groups = nnx.split(module, nnx.Param, nnx.RngState, ...)
    return _Parts(graphdef, *(list(nnx.to_flat_state(group)) for group in groups))


def _plain(flat: list[tuple[Any, Any]], value: Callable[[Any], Any]) -> dict[str, Any]:
    return tree.nested((tuple(str(part) for part in path), value(variable)) for path, variable in flat)


def _value(variable: Any) -> jax.Array:
    return variable.get_value()


def _names(variable: Any) -> jax.P:
    return jax.P(*(variable.get_metadata().get(AXES) or ()))


def _filled(flat: list[tuple[Any, Any]], values: Tree, group: str) -> list[tuple[Any, Any]]:
    """The variables with the values of a nested dict, found by path: as strings, "10" sorts before "2", so the order of leaves
    would permute the layers of an `nnx.List`."""
    out = []
    for path, variable in flat:
        node = values
        for part in path:
            try:
                node = node[str(part)]
            except (KeyError, TypeError):
                raise ValueError(f"variables lack {group}/{'/'.join(map(str, path))}, which the module has") from None
        out.append((path, variable.replace(node)))
    return out


def _generators(flat: list[tuple[Any, Any]], key: Key) -> list[tuple[Any, Any]]:
    """Each generator's key is the step's key folded with its index, its counter 0; stacked ones get a key a layer."""

    def one(index: int, variable: Any) -> Any:
        if not jax.dtypes.issubdtype(variable.dtype, jax.dtypes.prng_key):
            return variable.replace(jnp.zeros(variable.shape, variable.dtype))
        own = jax.random.fold_in(key, index)
        return variable.replace(jax.random.split(own, variable.shape) if variable.shape else own)

    return [(path, one(index, variable)) for index, (path, variable) in enumerate(flat)]


def _check_no_bare_array(module: nnx.Module) -> None:
    for path, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Variable) or not isinstance(node, nnx.Module):
            continue
        for name, value in vars(node).items():
            if isinstance(value, jax.Array | jax.ShapeDtypeStruct):
                where = "/".join([*map(str, path), name])
                raise ValueError(
                    f"{type(module).__name__}: {where} is a bare array; hold it in an nnx.Param or another nnx.Variable"
                )


def functional(make_module: Callable[[nnx.Rngs], nnx.Module]) -> Functional:
    """The module that `make_module(rngs)` makes, as pure functions. It is built once, on shapes alone, and not kept."""
    abstract = nnx.eval_shape(lambda: make_module(nnx.Rngs(0)))
    _check_no_bare_array(abstract)
    _set_scopes(abstract)
    name = type(abstract).__name__
    modes = {}
    for train in (False, True):
        (abstract.train if train else abstract.eval)()
        modes[train] = _split(abstract)
    parts = modes[False]
    draws = [path for path, _ in parts.generators]
    paths = [path for path, _ in parts.state]
    axes = {"params": _plain(parts.params, _names), "state": _plain(parts.state, _names), "frozen": {}}

    def init(key: Key) -> Variables:
        made = _split(make_module(nnx.Rngs(key)))
        return {"params": _plain(made.params, _value), "state": _plain(made.state, _value), "frozen": {}}

    def merged(variables: Variables, key: Key, train: bool) -> nnx.Module:
        now = modes[train]
        filled = (
            _filled(now.params, variables["params"], "params"),
            _generators(now.generators, key),
            _filled(now.state, variables["state"], "state"),
        )
        return nnx.merge(now.graphdef, *(nnx.from_flat_state(flat) for flat in filled))

    def apply(variables: Variables, *args: Any, key: Key | None = None, train: bool = False, method: str = "__call__"):
        if key is None:
            if train and draws:
                raise ValueError(f"{name} draws random numbers in training ({'/'.join(map(str, draws[0]))}): apply needs a key")
            key = jax.random.key(0)
        module = merged(variables, key, train)
        output = getattr(module, method)(*args)
        if not paths:
            return output, {}
        state = _split(module).state
        if [path for path, _ in state] != paths:
            raise ValueError(f"{name}.{method} adds or removes variables; make them all in __init__")
        return output, _plain(state, _value)

    def ask(method: str, *args: Any) -> Any:
        return getattr(nnx.merge(parts.graphdef, *(nnx.from_flat_state(flat) for flat in parts[1:])), method)(*args)

    return Functional(init, apply, axes, ask)
