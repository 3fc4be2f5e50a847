"""Hyperparameters learned through a whole training run on MNIST-1D (Greydanus and Kobak 2020, arXiv 2011.14439, section 3.4).

    gnomon reproduce mnist1d_meta                          # a learning rate from both sides; an activation function beside ReLU
    gnomon train --config configs/papers/mnist1d_meta/config.py:rate_low

Protocol, from the notebooks published with the paper: 8,000 training examples. The rate: an MLP of one layer of 50 tanh, 200
steps of gradient descent on batches of 50 in order; the outer loss is the mean of the 200 inner losses; 50 outer steps of 0.3,
from 1.5 or from 0.15. The activation: an MLP of one layer of 128, 301 steps of RMSProp at 0.01 (decay 0.4) on batches of 100 in
order, noise on its hidden units; the activation is ELU and 0.2 times a network; the outer loss is the mean of the last 200
inner losses; 301 outer steps of 0.3, gradients clipped at 0.1.
"""

from ml_collections import ConfigDict

ARGS = ("smoke", "rate_low", "rate_high", "activation", "relu")
STARTS = {"rate_low": 0.15, "rate_high": 1.5}


def get_config(arg: str = "") -> ConfigDict:
    arg = arg or "rate_low"
    config = ConfigDict({"seed": 0, "data": {"samples": 10_000, "seed": 42}, "checkpoint": {"every": 0}})
    if arg in ("activation", "relu"):
        config.kind, learned = "activation", arg == "activation"
        config.inner = {"hidden": 128, "batch": 100, "steps": 301, "learning_rate": 0.01, "decay": 0.4, "noise": 0.1}
        config.activation = {"base": "elu" if learned else "relu", "scale": 0.2 if learned else 0.0, "width": 16}
        config.outer = {"learning_rate": 0.3 if learned else 0.0, "clip": 0.1, "last": 200}
        config.train = {"steps": 301 if learned else 5, "steps_per_call": 1, "log_every": 10}
        config.checkpoint.every = 20
    else:
        config.kind = "rate"
        config.inner = {"hidden": 50, "batch": 50, "steps": 200}
        config.outer = {"learning_rate": 0.3, "start": STARTS.get(arg, 0.15)}
        config.train = {"steps": 50, "steps_per_call": 1, "log_every": 5}
    if arg == "smoke":
        config.inner.steps = 5
        config.train.update({"steps": 4, "log_every": 2})
    return config


def build(config: ConfigDict):
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from research.core.batches import from_function
    from research.core.names import choose
    from research.core.types import Evaluation, Evaluator, Stage
    from research.data.mnist1d import mnist1d
    from research.experiment import Experiment
    from research.learners import gradient
    from research.models.mlp import mlp
    from research.tasks import classification, learned_activation
    from research.transforms import bilevel, hyper

    inner = config.inner
    x, y = mnist1d(samples=config.data.samples, seed=config.data.seed)["train"]
    rows = np.arange(inner.steps * inner.batch).reshape(inner.steps, inner.batch) % len(y)
    batch = {"train": {"inputs": x[rows], "targets": y[rows], "mask": np.ones(rows.shape, np.float32)}}

    def rate():
        model = mlp(shape=[40], outputs=10, hidden=[inner.hidden], activation="tanh", residual=False, dropout=0.0,
                    init="uniform", dtype="float32")  # fmt: skip
        plain = classification(model, batch=inner.batch, shape=[40], label_smoothing=0.0)
        task = hyper(lambda h: plain, lambda key: {"rate": jnp.full((), config.outer.start)})
        return bilevel(task, None, lambda h: optax.sgd(h["rate"]), inner.steps, restart=True), optax.identity()

    def activation():
        shape = {"hidden": inner.hidden, "width": config.activation.width, "noise": inner.noise}
        task = learned_activation(
            features=40, classes=10, batch=inner.batch, base=config.activation.base, scale=config.activation.scale, **shape
        )
        tx = optax.rmsprop(inner.learning_rate, inner.decay, eps_in_sqrt=False, initial_scale=1.0)
        whole = bilevel(task, None, lambda h: tx, inner.steps, last=config.outer.last, restart=True, remat=True)
        return whole, optax.clip(config.outer.clip)

    task, clip = choose({"rate": rate, "activation": activation}, config.kind, "kind")()
    learner = gradient(task, optax.chain(clip, optax.sgd(config.outer.learning_rate)))

    def measured(stats, variables, batch, key):
        """A training run with the hyperparameters as they are, from weights of its own."""
        value, aux = task.loss(variables, batch, key)
        seen = {"loss": value, "inner_loss": aux.metrics["inner_loss"][0], **rate_of(variables), "runs": jnp.ones(())}
        return jax.tree.map(jnp.add, stats, seen)

    def rate_of(variables):
        return {"rate": variables["params"]["rate"]} if config.kind == "rate" else {}

    names = ("loss", "inner_loss", *(["rate"] if config.kind == "rate" else []))
    evaluator = Evaluator(
        lambda: {name: jnp.zeros(()) for name in (*names, "runs")},
        measured,
        lambda stats: {name: float(stats[name] / stats["runs"]) if stats["runs"] else float("nan") for name in names},
    )
    return Experiment(
        [Stage(learner, from_function(lambda i: batch, fingerprint="mnist1d in order"), config.train.steps)],
        {"run": Evaluation(evaluator, from_function(lambda i: batch, 1), 0)},
        seed=config.seed,
        steps_per_call=config.train.steps_per_call,
        log_every=config.train.log_every,
        replay=False,
        checkpoints={"every": config.checkpoint.every},
    )
