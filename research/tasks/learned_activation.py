"""A network whose activation function is a network too."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from research.core import metrics
from research.core.names import choose
from research.core.types import Array, Aux, Batch, Example, Key, Method, Spec, Task, Tree, Variables
from research.nn import checks
from research.nn.losses import cross_entropy
from research.tasks import _context

BASES = {"elu": jax.nn.elu, "relu": jax.nn.relu, "tanh": jnp.tanh}


def learned_activation(
    *,
    features: int,
    classes: int,
    batch: int,
    hidden: int = 128,
    width: int = 100,
    noise: float = 0.1,
    scale: float = 0.2,
    base: str = "elu",
) -> Task:
    """Classification by one hidden layer, whose activation is base(x) + scale x a network of one hidden layer of tanh on the
    single number x (Greydanus and Kobak 2020, arXiv 2011.14439, and the notebook published with it, which adds noise to hidden
    units so that gradients are smooth).

    params: {"inner": the classifier, "outer": the activation}, as `transforms.bilevel` takes them. noise: uniform from -noise
    to noise on each hidden unit of the classifier, the same for all examples of a batch; in training alone. Batches, metrics
    and predict are those of `classification`. base: what the activation begins near, a name in BASES. Method activation:
    {"inputs" [batch]} -> [batch]. Raises ValueError for sizes below 1.
    """
    for name, value in {"features": features, "classes": classes, "batch": batch, "hidden": hidden, "width": width}.items():
        checks.positive(f"task.{name}", value)
    checks.not_negative("task.noise", noise)
    begin = choose(BASES, base, "task.base")
    classifier = _context.network(features, classes, [hidden], "relu", "uniform")  # its params alone are used
    learned = _context.network(1, 1, [width], "tanh", "uniform")

    def init(key: Key) -> Variables:
        inner, outer = _context.apart(key, classifier, learned)
        return {"params": {"inner": inner, "outer": outer}, "state": {}, "frozen": {}}

    def activation(outer: Tree, x: Array) -> Array:
        return begin(x) + scale * _context.apply(learned, outer, x.reshape(-1, 1)).reshape(x.shape)

    def logits(params: Tree, x: Array, shift: Array) -> Array:
        (layer,), head = params["inner"]["layers"].values(), params["inner"]["head"]
        h = activation(params["outer"], x @ layer["kernel"] + layer["bias"][None]) + shift[None]
        return h @ head["kernel"] + head["bias"][None]

    def predict(variables: Variables, inputs: Tree, key: Key) -> Array:
        return logits(variables["params"], inputs["inputs"], jnp.zeros(hidden))

    def loss(variables: Variables, batch: Batch, key: Key) -> tuple[Array, Aux]:
        shift = noise * jax.random.uniform(key, (hidden,), minval=-1.0, maxval=1.0)
        found = logits(variables["params"], batch["inputs"], shift)
        nll, _ = cross_entropy(found, batch["targets"], label_smoothing=0.0)
        pair = metrics.masked(nll, batch["mask"])
        correct = metrics.masked(found.argmax(-1) == batch["targets"], batch["mask"])
        return metrics.mean(pair), Aux(variables["state"], jax.lax.stop_gradient({"nll": pair, "accuracy": correct}), pair[1])

    inputs = Spec((batch, features), jnp.float32, ("batch",))
    methods = {
        "predict": Method(predict, {"inputs": inputs}),
        "activation": Method(
            lambda variables, inputs, key: activation(variables["params"]["outer"], inputs["inputs"]),
            {"inputs": Spec((batch,), jnp.float32, ("batch",))},
        ),
    }
    each = {"targets": Spec((batch,), jnp.int32, ("batch",)), "mask": Spec((batch,), jnp.float32, ("batch",))}
    axes = {"inner": classifier.axes["params"], "outer": learned.axes["params"]}
    return Task(init, loss, methods, {"inputs": inputs, **each}, {"params": axes, "state": {}, "frozen": {}})


def example() -> Example:
    return Example(learned_activation(features=3, classes=3, batch=4, hidden=5, width=6))
