"""Predicting a function from some of its values, with how sure one is."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from research.core import metrics
from research.core.types import Array, Aux, Batch, Example, Key, Method, Task, Tree, Variables
from research.tasks import _context

LEAST = 0.1  # of the scale, as in the authors' code: a query point that is in the support may not have none


def neural_process(
    *,
    features: int,
    outputs: int,
    support: int,
    query: int,
    encoder: Sequence[int] = (128, 128),
    width: int = 128,
    decoder: Sequence[int] = (128, 128),
    activation: str = "relu",
) -> Task:
    """A conditional neural process (Garnelo et al. 2018, arXiv 1807.01613, equations 1 to 3): an encoder of each (input,
    target) of the support, their mean [width], and a decoder of it beside each query input, to a mean and a scale an output.

    Batches are {"support", "query"}, each {"inputs" float32 [rows, features], "targets" [rows, outputs], "mask" [rows]}, as
    `tasks.families.episodes` draws them. Loss: the masked mean over query points of the negative log likelihood, nats, summed
    over outputs. Metrics: "nll", "mse". Method predict: {"support", "query": {"inputs"}} -> {"mean", "scale"} [query, outputs].
    Nothing adapts: a support is read in one pass. Raises ValueError for sizes below 1.
    """
    encode = _context.network(features + outputs, width, encoder, activation)
    decode = _context.network(features + width, 2 * outputs, decoder, activation)
    specs = _context.specs(features, outputs, support, query)

    def init(key: Key) -> Variables:
        encoding, decoding = _context.apart(key, encode, decode)
        return {"params": {"encoder": encoding, "decoder": decoding}, "state": {}, "frozen": {}}

    def predict(variables: Variables, inputs: Tree, key: Key) -> dict[str, Array]:
        params = variables["params"]
        context = _context.read(encode, params["encoder"], inputs["support"])
        out = _context.apply(decode, params["decoder"], _context.beside(inputs["query"]["inputs"], context))
        mean, raw = jnp.split(out, 2, -1)
        return {"mean": mean, "scale": LEAST + (1 - LEAST) * jax.nn.softplus(raw)}

    def loss(variables: Variables, batch: Batch, key: Key) -> tuple[Array, Aux]:
        found, query = predict(variables, batch, key), batch["query"]
        nll = -jax.scipy.stats.norm.logpdf(query["targets"], found["mean"], found["scale"]).sum(-1)
        pair = metrics.masked(nll, query["mask"])
        squared = metrics.masked(((query["targets"] - found["mean"]) ** 2).mean(-1), query["mask"])
        return metrics.mean(pair), Aux(variables["state"], jax.lax.stop_gradient({"nll": pair, "mse": squared}), pair[1])

    inputs = {"support": specs["support"], "query": {"inputs": specs["query"]["inputs"]}}
    axes = {"params": {"encoder": encode.axes["params"], "decoder": decode.axes["params"]}, "state": {}, "frozen": {}}
    return Task(init, loss, {"predict": Method(predict, inputs)}, specs, axes)


def example() -> Example:
    return Example(
        neural_process(features=2, outputs=1, support=3, query=4, encoder=[5], width=6, decoder=[5], activation="tanh")
    )
