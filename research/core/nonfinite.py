"""What to do about NaN and infinity: find the step, then, on a replay of it, the first value that is not finite.

`first_nonfinite` walks a function's jaxpr equation by equation, into calls and loops, so it needs nothing of the model; it is
slow, and runs once, when training has failed already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from research.core.processes import on_host
from research.core.tree import joined, leaves_with_paths
from research.core.types import Key, Learner, State


class NonFiniteError(ArithmeticError):
    """Training met NaN or infinity. The message names the step and where it began."""


def _bad(x: Any) -> str | None:
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    x = on_host(x).astype(np.float64)
    return "NaN" if np.isnan(x).any() else "infinity" if np.isposinf(x).any() else None


def _where(eqn: Any) -> str:
    """The name scopes and the source line of an equation, as far as jax has kept them."""
    names = str(eqn.source_info.name_stack)
    tb = eqn.source_info.traceback
    frames = [f for f in (tb.frames if tb is not None else ()) if "/jax/" not in f.file_name and "/flax/" not in f.file_name]
    line = f"{frames[0].file_name.rsplit('/', 1)[-1]}:{frames[0].line_num}" if frames else ""
    return ", ".join(s for s in (eqn.primitive.name, names, line) if s)


def _apply(eqn: Any, inputs: list[Any], debug: Any) -> list[Any]:
    """One equation, run as a program of its own; None in place of an output that nothing reads."""
    given = [(v, x) for v, x in zip(eqn.invars, inputs) if not isinstance(v, jex.Literal)]
    known = dict(given)
    out = [v for v in eqn.outvars if type(v).__name__ != "DropVar"]
    program = jex.Jaxpr((), list(known), out, [eqn], eqn.effects, debug)
    results = iter(jex.jaxpr_as_fun(jex.ClosedJaxpr(program, ()))(*known.values()))
    return [None if type(v).__name__ == "DropVar" else next(results) for v in eqn.outvars]


_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def _walk(jaxpr: Any, consts: Any, args: Any, trail: str) -> tuple[list[Any], str | None]:
    """Evaluates; returns outputs and the first equation whose output is not finite though its inputs are."""
    debug = jaxpr.debug_info._replace(arg_names=None, result_paths=None)  # of the function at large: names and lines
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, args))

    def read(v):
        return v.val if isinstance(v, jex.Literal) else env[v]

    for eqn in jaxpr.eqns:
        inputs = [read(v) for v in eqn.invars]
        name, params = eqn.primitive.name, eqn.params
        found = None
        if name == "scan":
            outputs, found = _walk_scan(eqn, inputs, trail, debug)
        else:
            inner = next((params[k] for k in _INNER if k in params), None)
            if inner is not None and name not in ("while", "cond", "custom_vjp_call", "custom_jvp_call"):
                closed = inner if hasattr(inner, "consts") else None
                body, c = (closed.jaxpr, closed.consts) if closed is not None else (inner, ())
                outputs, found = _walk(body, c, inputs, trail)
            else:
                outputs = _apply(eqn, inputs, debug)
                # not of what was walked: its equations have answered, and a constant of its own may be NaN on purpose
                if not any(_bad(x) for x in inputs):
                    kind = next((k for k in map(_bad, outputs) if k), None)
                    found = f"{kind} from {trail}{_where(eqn)}" if kind else None
        if found:
            return [], found
        env.update(zip(eqn.outvars, outputs))
    return [read(v) for v in jaxpr.outvars], None


def _walk_scan(eqn: Any, inputs: list[Any], trail: str, debug: Any) -> tuple[list[Any], str | None]:
    p = eqn.params
    closed = p["jaxpr"]
    # jax 0.10 counts them; 0.12 keeps the three parts of the inputs
    counts = [p["num_consts"], p["num_carry"]] if "num_carry" in p else [len(part) for part in p["ft_in"].unpack()]
    n_consts, n_carry, *_ = counts
    consts, carry, xs = inputs[:n_consts], inputs[n_consts : n_consts + n_carry], inputs[n_consts + n_carry :]
    order = range(p["length"])
    ys: list[list[Any]] = []
    for i in reversed(order) if p["reverse"] else order:
        out, found = _walk(closed.jaxpr, closed.consts, [*consts, *carry, *[x[i] for x in xs]], f"{trail}iteration {i}: ")
        if found:
            return [], found
        carry = out[:n_carry]
        ys.append(out[n_carry:])
    ys = ys[::-1] if p["reverse"] else ys
    if not ys:
        return _apply(eqn, inputs, debug), None
    return [*carry, *[jnp.stack(y) for y in zip(*ys)]], None


def first_nonfinite(function: Callable[..., Any], *args: Any) -> str | None:
    """Names the first input leaf or equation of `function(*args)` that is not finite; None if all is. Minus infinity alone, as
    masks use it, does not count."""
    for path, leaf in leaves_with_paths(args):
        if kind := _bad(leaf):
            return f"{kind} in the input {joined(path[1:])}"
    closed = jax.make_jaxpr(function)(*args)
    return _walk(closed.jaxpr, closed.consts, jax.tree.leaves(args), "")[1]


class Replay:
    """Keeps what is needed to run the last steps again: a copy of the State at the last look, and the batches since.

    With `keep` False nothing is kept, and a failure is named by its step alone.
    """

    def __init__(self, learner: Learner, key: Key, keep: bool):
        self._learner, self._key, self._keep = learner, key, keep
        self._state: State | None = None
        self._calls: list[Any] = []

    def anchor(self, state: State) -> None:
        self._calls = []
        if self._keep:
            self._state = jax.tree.map(jnp.copy, state)

    def keep(self, batches: Any, length: int) -> None:
        if self._keep:
            self._calls.append((batches, length))

    def check(self, host: Mapping[str, tuple[np.ndarray, np.ndarray]], step: int) -> None:
        """Raises NonFiniteError at the first step whose loss is not finite; in a population, where no member's is."""
        total, weight = host["loss"]
        alive = np.isfinite(total) & np.isfinite(weight)
        alive = alive.reshape(len(total), -1).any(1)
        if alive.all():
            return
        offset = int(np.argmin(alive))
        failed = step - len(total) + offset
        raise NonFiniteError(f"the loss is not finite at step {failed}{self._explain(offset)}")

    def _explain(self, offset: int) -> str:
        if self._state is None:
            return ""
        step = jax.jit(lambda s, b, k: self._learner.step(s, b, jax.random.fold_in(k, s["step"])))
        batches = [jax.tree.map(lambda x, i=i: x[i], b) for b, n in self._calls for i in range(n)]
        state = self._state
        for batch in batches[:offset]:
            state, _ = step(state, batch, self._key)
        cause = first_nonfinite(self._learner.step, state, batches[offset], jax.random.fold_in(self._key, state["step"]))
        return f"; on replay: {cause}" if cause else "; on a replay every value was finite"
