"""What tasks share that read a support, a set of examples, before they are asked about a query."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from research.core.types import Array, Batch, Spec, Tree
from research.models.mlp import mlp
from research.nn import checks
from research.nn.functional import Functional


def specs(features: int, outputs: int, support: int, query: int) -> Tree:
    """{"support", "query"}: inputs [rows, features], targets [rows, outputs], mask; of these the query's are "batch"."""
    checks.positive("task.support", support)
    checks.positive("task.query", query)

    def rows(n: int, axis: str) -> dict[str, Spec]:
        return {
            "inputs": Spec((n, features), jnp.float32, (axis,)),
            "targets": Spec((n, outputs), jnp.float32, (axis,)),
            "mask": Spec((n,), jnp.float32, (axis,)),
        }

    return {"support": rows(support, "inner_batch"), "query": rows(query, "batch")}


def network(inputs: int, outputs: int, hidden: Sequence[int], activation: str, init: str = "normal") -> Functional:
    return mlp(
        shape=[inputs], outputs=outputs, hidden=hidden, activation=activation, residual=False, dropout=0.0, init=init,
        dtype="float32",
    )  # fmt: skip


def apply(model: Functional, params: Tree, x: Array) -> Array:
    """A network without state on [rows, inputs]."""
    return model.apply({"params": params, "state": {}, "frozen": {}}, x)[0]


def read(encoder: Functional, params: Tree, support: Batch) -> Array:
    """The mean over what the mask leaves of the support of the encoder's outputs on (inputs, targets): [width], whatever the
    order of the examples; 0 where there are none."""
    each = apply(encoder, params, jnp.concatenate([support["inputs"], support["targets"]], -1))
    mask = support["mask"][:, None]
    return jnp.where(mask != 0, each * mask, 0).sum(0) / jnp.maximum(mask.sum(), 1)


def beside(x: Array, context: Array) -> Array:
    """[rows, features + width]: each row of x with the context behind it."""
    return jnp.concatenate([x, jnp.broadcast_to(context[None], (x.shape[0], *context.shape))], -1)


def apart(key: jax.Array, *models: Functional) -> list[Tree]:
    """Params of each, from a key of its own."""
    return [model.init(k)["params"] for model, k in zip(models, jax.random.split(key, len(models)))]
