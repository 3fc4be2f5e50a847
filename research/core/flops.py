"""Floating point operations of a function, counted in its jaxpr with the trip counts of its loops.

A multiply-add is 2. Matrix products and convolutions are counted, element-wise work is not, as is usual for model FLOPs
utilization (PaLM, arXiv 2204.02311, appendix B). A compiler's own cost analysis counts the body of a scan once; this does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from research.core.types import Learner


def count_flops(function: Callable[..., Any], *args: Any) -> int:
    """FLOPs of `function(*args)`; args may be ShapeDtypeStructs. The longest branch of a cond counts; a while loop's body once,
    since its trip count is not known."""
    return _of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def step_flops(learner: Learner) -> int:
    """FLOPs of one step of a learner: forward, backward, optimizer."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), learner.batch)
    return count_flops(learner.step, jax.eval_shape(learner.init, key), batch, key)


def _of_jaxpr(jaxpr: Any) -> int:
    return sum(_of_equation(eqn) for eqn in jaxpr.eqns)


def _of_equation(eqn: Any) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        lhs = eqn.invars[0].aval.shape
        return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[d] for d in contracting)
    if name == "conv_general_dilated":
        kernel, numbers = eqn.invars[1].aval.shape, params["dimension_numbers"]
        per_output = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
        return 2 * math.prod(eqn.outvars[0].aval.shape) * per_output
    inner = [_of_jaxpr(j) for j in _inner(params)]
    if name == "cond":
        return max(inner)
    return sum(inner) * (params["length"] if name == "scan" else 1)


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
