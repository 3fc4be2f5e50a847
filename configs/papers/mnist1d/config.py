"""Scaling down deep learning (Greydanus and Kobak 2020, arXiv 2011.14439): MNIST-1D, four models, plain and shuffled.

    gnomon reproduce mnist1d                          # all rows of the table, every seed of a model at once
    gnomon train --config configs/papers/mnist1d/config.py:cnn

Protocol, from the paper's repository: 4,000 training and 1,000 test examples, 6,000 steps of Adam at 0.01 with batches of 100.
Published test accuracy: linear 0.32, MLP 0.68, CNN 0.94, GRU 0.91; shuffled CNN 0.56, GRU 0.57. No choice is made on anything
here, so there is no validation split. Time: see results.jsonl beside this file.
"""

from ml_collections import ConfigDict

from configs.base import base

MODELS = ("linear", "mlp", "cnn", "gru")
ARGS = ("smoke", *MODELS, *(f"{model}_shuffled" for model in MODELS))
SEEDS = 5


def get_config(arg: str = "") -> ConfigDict:
    model, _, shuffled = (arg if arg not in ("", "smoke") else "mlp").partition("_")
    config = base()
    config.task = {"name": "classification", "label_smoothing": 0.0}
    config.data = {"name": "mnist1d", "shuffled": bool(shuffled), "seed": 42}
    config.model = {"name": "mnist1d", "kind": model}
    config.stream = {"batch": 100, "validation": 0, "bad_records": "raise"}
    config.optimizer = {"name": "adamw", "learning_rate": 0.01}
    config.learner = {"wrap": ["population"], "population": {"n": SEEDS, "method": "vmap"}, "watch": {}}
    config.evaluate = {"every": 0, "batch": 1000}
    config.train.update({"steps": 6000, "steps_per_call": 50, "log_every": 500, "replay": False})
    config.checkpoint.update({"every": 2000})
    if arg == "smoke":
        config.train.update({"steps": 20, "steps_per_call": 5, "log_every": 10})
        config.checkpoint.every = 10
    return config
