"""Weights that another network makes, from a set of examples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from research.core import metrics
from research.core.contracts import abstract_key
from research.core.types import Array, Aux, Batch, Example, Key, Method, Task, Tree, Variables
from research.tasks import _context


def hypernetwork(
    *,
    features: int,
    outputs: int,
    support: int,
    query: int,
    encoder: Sequence[int] = (128, 128),
    width: int = 64,
    hidden: Sequence[int] = (40, 40),
    activation: str = "relu",
) -> Task:
    """A network whose weights are generated (Ha et al. 2016, arXiv 1609.09106, section 3.1, by one linear layer): an encoder
    reads the support into [width], which a linear layer turns into all weights of an MLP of `hidden` widths, as an offset from
    weights that are learned. The layer begins small, so that the MLP begins as one that is trained alone would.

    Batches are those of `neural_process`. Loss: the masked mean over query points of the squared error, averaged over outputs.
    Metric: "mse". Methods: predict {"support", "query": {"inputs"}} -> [query, outputs]; generate {"support"} -> the MLP's
    params. params: {"encoder", "base": the MLP's, "generator": [width, as many weights as it has]}. Raises ValueError for sizes
    below 1.
    """
    encode = _context.network(features + outputs, width, encoder, activation)
    target = _context.network(features, outputs, hidden, activation)
    specs = _context.specs(features, outputs, support, query)
    shapes = jax.eval_shape(target.init, abstract_key())["params"]
    leaves, structure = jax.tree.flatten(shapes)
    ends = jnp.cumsum(jnp.asarray([math.prod(x.shape) for x in leaves])).tolist()

    def init(key: Key) -> Variables:
        k_models, k_generator = jax.random.split(key)
        encoding, base = _context.apart(k_models, encode, target)
        generator = 0.01 * jax.random.normal(k_generator, (width, ends[-1])) * width**-0.5
        return {"params": {"encoder": encoding, "base": base, "generator": generator}, "state": {}, "frozen": {}}

    def generate(variables: Variables, inputs: Tree, key: Key) -> Tree:
        params = variables["params"]
        flat = jnp.tanh(_context.read(encode, params["encoder"], inputs["support"])) @ params["generator"]
        parts = [flat[a:b].reshape(x.shape) for a, b, x in zip([0, *ends], ends, leaves)]
        return jax.tree.map(jnp.add, params["base"], jax.tree.unflatten(structure, parts))

    def predict(variables: Variables, inputs: Tree, key: Key) -> Array:
        return _context.apply(target, generate(variables, inputs, key), inputs["query"]["inputs"])

    def loss(variables: Variables, batch: Batch, key: Key) -> tuple[Array, Aux]:
        error = ((predict(variables, batch, key) - batch["query"]["targets"]) ** 2).mean(-1)
        pair = metrics.masked(error, batch["query"]["mask"])
        return metrics.mean(pair), Aux(variables["state"], jax.lax.stop_gradient({"mse": pair}), pair[1])

    support_alone = {"support": specs["support"]}
    methods = {
        "predict": Method(predict, {**support_alone, "query": {"inputs": specs["query"]["inputs"]}}),
        "generate": Method(generate, support_alone),
    }
    params = {"encoder": encode.axes["params"], "base": target.axes["params"], "generator": jax.P("embed")}
    return Task(init, loss, methods, specs, {"params": params, "state": {}, "frozen": {}})


def example() -> Example:
    return Example(hypernetwork(features=2, outputs=1, support=3, query=4, encoder=[5], width=4, hidden=[3], activation="tanh"))
