"""How often the bodies of while loops run whose ends do not depend on a program's inputs, as in loops over lists of blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

Path = tuple[int, ...]  # of an equation: its place, after those of the equations around it
CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call")


def trips(program: ClosedJaxpr) -> Mapping[Path, int]:
    """Passes through the body of every such loop, all times it is entered. Loops inside of a cond are left out.

    Everything that is computed from constants alone is computed, and compiled to no more than what the counts need.
    """
    found: dict[Path, Any] = {}

    def counted() -> dict[str, Any]:
        found.update(_run(program.jaxpr, program.consts, [None] * len(program.jaxpr.invars), ())[1])
        return {str(i): n for i, n in enumerate(found.values())}

    numbers = jax.jit(counted)()
    return {path: int(numbers[str(i)]) for i, path in enumerate(found)}


def _run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], path: Path) -> tuple[list[Any], dict[Path, Any]]:
    """(results, None where they are not known; passes through loops)."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    counts: dict[Path, Any] = {}

    def read(x: Any) -> Any:
        return jnp.asarray(x.val, x.aval.dtype) if hasattr(x, "val") else values.get(x)

    for place, eqn in enumerate(jaxpr.eqns):
        got = [read(x) for x in eqn.invars]
        out, more = _equation(eqn, got, (*path, place))
        values.update((x, y) for x, y in zip(eqn.outvars, out, strict=True) if y is not None)
        counts |= more
    return [read(x) for x in jaxpr.outvars], counts


def _equation(eqn: Any, got: list[Any], path: Path) -> tuple[Sequence[Any], dict[Path, Any]]:
    name, params, unknown = eqn.primitive.name, eqn.params, [None] * len(eqn.outvars)
    if name == "scan":
        return _scan(params, got, path)
    if name == "while":
        return _while(params, got, path)
    if name in CALLS:
        inner = next(params[key] for key in ("jaxpr", "call_jaxpr") if key in params)
        jaxpr, consts = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
        return _run(jaxpr, consts, got, path)
    if name in ("cond", "shard_map") or eqn.effects or any(x is None for x in got):
        return unknown, {}
    out = eqn.primitive.bind(*got, **params)
    return out if eqn.primitive.multiple_results else [out], {}


def _stays(body: Callable[[list[Any]], list[Any]], start: Sequence[Any]) -> list[bool]:
    """Which parts of a loop's carry are known in every pass."""
    known = [x is not None for x in start]
    while True:
        seen: list[bool] = []

        def once(carry: list[Any], seen: list[bool] = seen) -> int:
            seen[:] = [x is not None for x in body(carry)]
            return 0

        jax.eval_shape(once, [x if yes else None for x, yes in zip(start, known)])
        still = [a and b for a, b in zip(known, seen)]
        if still == known:
            return known
        known = still


def _scan(params: dict[str, Any], got: list[Any], path: Path) -> tuple[list[Any], dict[Path, Any]]:
    jaxpr, split = params["jaxpr"], params["num_consts"]
    width = params["num_carry"]
    consts, start, every = got[:split], got[split : split + width], got[split + width :]

    def run(carry: Sequence[Any], x: Sequence[Any]) -> tuple[list[Any], dict[Path, Any]]:
        return _run(jaxpr.jaxpr, jaxpr.consts, [*consts, *carry, *x], path)

    known = [False] * width
    if params["length"]:
        first = [None if x is None else x[0] for x in every]
        known = _stays(lambda carry: run(carry, first)[0][:width], start)

    def step(carry: list[Any], x: list[Any]) -> Any:
        out, counts = run(carry, x)
        keys[:] = counts
        return _only(out[:width], known), (out[width:], list(counts.values()))

    keys: list[Path] = []
    carry, (ys, counts) = jax.lax.scan(step, _only(start, known), every, params["length"], params["reverse"])
    return [*carry, *ys], {key: n.sum(0) for key, n in zip(keys, counts)}


def _while(params: dict[str, Any], got: list[Any], path: Path) -> tuple[Sequence[Any], dict[Path, Any]]:
    cond, body = params["cond_jaxpr"], params["body_jaxpr"]
    split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    cond_consts, body_consts, start = got[: split[0]], got[split[0] : split[1]], got[split[1] :]

    def run(carry: Sequence[Any]) -> tuple[list[Any], dict[Path, Any]]:
        return _run(body.jaxpr, body.consts, [*body_consts, *carry], path)

    def goes_on(carry: Sequence[Any]) -> Any:
        return _run(cond.jaxpr, cond.consts, [*cond_consts, *carry], path)[0][0]

    known = _stays(lambda carry: run(carry)[0], start)
    start = _only(start, known)
    if goes_on(start) is None:
        return [None] * len(start), {}
    inside = jax.eval_shape(lambda: list(run(start)[1].values()))

    def step(state: Any) -> Any:
        carry, n, counts = state
        out, more = run(carry)
        return _only(out, known), n + 1, [a + b for a, b in zip(counts, more.values())]

    zeros = [jnp.zeros((), x.dtype) for x in inside]
    keys = list(run(start)[1])
    carry, n, counts = jax.lax.while_loop(lambda state: goes_on(state[0]), step, (start, jnp.int32(0), zeros))
    return carry, {path: n, **dict(zip(keys, counts))}


def _only(values: Sequence[Any], known: Sequence[bool]) -> list[Any]:
    return [x if yes else None for x, yes in zip(values, known)]
