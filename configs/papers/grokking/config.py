"""Grokking modular addition (Gromov 2023, arXiv 2301.02679): two layers with squares between them, on whole batches.

    gnomon reproduce grokking
    gnomon train --config configs/papers/grokking/config.py:addition

Pairs (a, b) of numbers below p = 97, one-hot, are mapped to one-hot a + b mod p by f(x) = W2 (W1 x)^2, without biases, with the
squared error. Half of all pairs are learned from, the others are the test. By gradient descent with momentum and no
regularization the training pairs are known by heart while the test is answered no better than by chance ("memorized" stops
there); then the test is answered too. `members` seeds are one population. Learning rate and steps were chosen on seed 1000,
which draws other pairs and weights. Time: see results.jsonl beside this file.
"""

from ml_collections import ConfigDict

ARGS = ("smoke", "addition", "memorized")


def get_config(arg: str = "") -> ConfigDict:
    config = ConfigDict(
        {
            "seed": 0,
            "modulus": 97,
            "width": 256,
            "fraction": 0.5,  # of the pairs, to learn from
            "optimizer": {"name": "sgd", "learning_rate": 150.0, "momentum": 0.9},
            "members": 3,
            "train": {"steps": 500, "steps_per_call": 20, "log_every": 20},
            "evaluate": {"every": 20},
            "checkpoint": {"every": 200},
        }
    )
    if arg == "memorized":  # so far the training pairs are known, and the test is not
        config.train.steps = 200
    if arg == "smoke":
        config.update({"modulus": 7, "width": 16})
        config.train.update({"steps": 20, "steps_per_call": 5, "log_every": 10})
        config.evaluate.every = 10
        config.checkpoint.every = 10
    return config


def build(config: ConfigDict):
    from research import Experiment, optim
    from research.core.batches import from_function
    from research.core.types import Evaluation, Stage
    from research.evals import accuracy
    from research.experiment.sections import arguments
    from research.learners import gradient, members, population

    parts = pairs(config.modulus, config.fraction, config.seed)
    said = f"pairs of {config.modulus}, {config.fraction}, seed {config.seed}"
    train = from_function(lambda i: parts["train"], fingerprint=f"train {said}")
    once = {name: from_function(lambda i, name=name: parts[name], 1, f"{name} {said}") for name in parts}
    task = addition(config.modulus, config.width, len(parts["train"]["targets"]))
    tx = optim.make(arguments(config.optimizer), steps=config.train.steps)
    learner = population(gradient(task, tx), config.members)
    measured = members(accuracy(task.methods["predict"].apply), config.members)
    return Experiment(
        [Stage(learner, train, config.train.steps)],
        {name: Evaluation(measured, once[name], config.evaluate.every) for name in parts},
        seed=config.seed,
        steps_per_call=config.train.steps_per_call,
        log_every=config.train.log_every,
        replay=False,
        checkpoints={"every": config.checkpoint.every},
        units={"pairs": len(parts["train"]["targets"])},
        show=[f"{name}/accuracy" for name in parts],
    )


def pairs(modulus, fraction, seed):
    """{"train", "test"}: {"inputs": int32 [n, 2], "targets": int32 [n], "mask"} of all pairs, apart."""
    import numpy as np

    from research.data.arrays import split_rows

    a, b = np.divmod(np.arange(modulus**2, dtype=np.int32), modulus)
    test, train = split_rows(modulus**2, fraction, seed=seed)
    return {
        name: {
            "inputs": np.stack([a, b], 1)[rows],
            "targets": ((a + b) % modulus)[rows],
            "mask": np.ones(len(rows), np.float32),
        }
        for name, rows in {"train": train, "test": test}.items()
    }


def addition(modulus, width, batch):
    """The Task: f(x) = W2 (W1 x)^2 of two one-hot numbers, the mean over pairs and classes of the squared error.

    Weights begin normal with the deviation 0.5 / (2 width)^(1/3), so that outputs are of one size at every width.
    """
    import jax
    import jax.numpy as jnp

    from research.core import metrics
    from research.core.types import Aux, Method, Spec, Task

    def init(key):
        deviation = 0.5 / (2 * width) ** (1 / 3)
        shapes = {"first": (2 * modulus, width), "second": (width, modulus)}
        keys = jax.random.split(key)
        params = {name: deviation * jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items())}
        return {"params": params, "state": {}, "frozen": {}}

    def predict(variables, inputs, key):
        one_hot = jax.nn.one_hot(inputs["inputs"], modulus).reshape(-1, 2 * modulus)
        return jnp.square(one_hot @ variables["params"]["first"]) @ variables["params"]["second"]

    def loss(variables, batch, key):
        outputs = predict(variables, batch, key)
        wanted = jax.nn.one_hot(batch["targets"], modulus)
        pair = metrics.masked(jnp.square(outputs - wanted).mean(1), batch["mask"])
        right = metrics.masked(outputs.argmax(1) == batch["targets"], batch["mask"])
        return metrics.mean(pair), Aux(variables["state"], {"mse": pair, "accuracy": right}, pair[1])

    inputs = Spec((batch, 2), jnp.int32, ("batch",))
    each = {"targets": Spec((batch,), jnp.int32, ("batch",)), "mask": Spec((batch,), jnp.float32, ("batch",))}
    axes = {"params": {"first": jax.P(None, "mlp"), "second": jax.P("mlp", None)}, "state": {}, "frozen": {}}
    return Task(init, loss, {"predict": Method(predict, {"inputs": inputs})}, {"inputs": inputs, **each}, axes)
