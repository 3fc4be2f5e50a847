"""Floating point operations of a function, counted in its jaxpr with the trip counts of its loops.

A multiply-add is 2. Matrix products and convolutions are counted, element-wise work is not, as is usual for model FLOPs
utilization (PaLM, arXiv 2204.02311, appendix B). A compiler's own cost analysis counts the body of a scan once; this does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from research.core.trips import Path, trips
from research.core.types import Learner


def count_flops(function: Callable[..., Any], *args: Any) -> int:
    """FLOPs of `function(*args)`; args may be ShapeDtypeStructs. The longest branch of a cond counts. The body of a while
    loop counts as often as it runs where that is known without the arguments (attention over lists of blocks), else once. A
    Pallas kernel counts what its cost estimate says, or else its body once for each point of its grid."""
    program = jax.make_jaxpr(function)(*args)
    return _of_jaxpr(program.jaxpr, 1, (), trips(program) if _multiplies(program.jaxpr, False) else {})


def _multiplies(jaxpr: Any, in_loop: bool) -> bool:
    """Whether a while loop has a matrix product or a convolution in it."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if in_loop and name in ("dot_general", "conv_general_dilated"):
            return True
        if name == "pallas_call":
            continue
        if any(_multiplies(inner, in_loop or name == "while") for inner in _inner(eqn.params)):
            return True
    return False


def step_flops(learner: Learner) -> int:
    """FLOPs of one step of a learner: forward, backward, optimizer."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), learner.batch)
    return count_flops(learner.step, jax.eval_shape(learner.init, key), batch, key)


def _of_jaxpr(jaxpr: Any, times: int, path: Path, passes: Mapping[Path, int]) -> int:
    """Of a program that runs so many times."""
    return sum(_of_equation(eqn, times, (*path, place), passes) for place, eqn in enumerate(jaxpr.eqns))


def _of_equation(eqn: Any, times: int, path: Path, passes: Mapping[Path, int]) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        lhs = eqn.invars[0].aval.shape
        return times * 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[d] for d in contracting)
    if name == "conv_general_dilated":
        kernel, numbers = eqn.invars[1].aval.shape, params["dimension_numbers"]
        per_output = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
        return times * 2 * math.prod(eqn.outvars[0].aval.shape) * per_output
    if name == "cond":
        return max(_of_jaxpr(branch, times, path, {}) for branch in _inner(params))
    if name == "pallas_call":
        if params["cost_estimate"] is not None:
            return times * params["cost_estimate"].flops
        times *= math.prod(params["grid_mapping"].grid)
    times = times * params["length"] if name == "scan" else passes.get(path, times)
    return sum(_of_jaxpr(inner, times, path, passes) for inner in _inner(params))


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs that an equation calls. Of a custom derivative the forward rule's is the function, the rest is not called."""
    for name, value in params.items():
        if name in ("fwd_jaxpr_thunk", "jvp_jaxpr_fun", "bwd"):
            continue
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns"):
                yield item
            elif hasattr(item, "jaxpr"):
                yield item.jaxpr
