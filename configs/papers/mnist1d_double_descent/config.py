"""Double descent on MNIST-1D (Greydanus and Kobak 2020, arXiv 2011.14439): with the width the test error falls, rises, falls.

    gnomon reproduce mnist1d_double_descent                # widths 16, 47 and 300, every seed of a width at once
    gnomon train --config configs/papers/mnist1d_double_descent/config.py:h47

Protocol, from the paper's notebook: 4,000 training and 12,000 test examples, 15% of the training labels drawn anew; two hidden
layers of one width, 500 epochs of SGD at 0.01 with momentum 0.9 and batches of 100. No choice is made on anything here, so
there is no validation split. Time: see results.jsonl beside this file; a few minutes a width on 2 cores.
"""

from ml_collections import ConfigDict

from configs.base import base

WIDTHS = (16, 47, 300)
ARGS = ("smoke", *(f"h{width}" for width in WIDTHS))
SEEDS = 3


def get_config(arg: str = "") -> ConfigDict:
    width = int(arg[1:]) if arg not in ("", "smoke") else WIDTHS[0]
    config = base()
    config.task = {"name": "classification", "label_smoothing": 0.0}
    config.data = {"name": "mnist1d", "shuffled": False, "seed": 42, "samples": 16_000, "train": 0.25, "label_noise": 0.15}
    config.model = {
        "name": "mlp",
        "hidden": [width, width],
        "activation": "relu",
        "residual": False,
        "dropout": 0.0,
        "init": "uniform",
        "dtype": "float32",
    }
    config.stream = {"batch": 100, "validation": 0, "bad_records": "raise"}
    config.optimizer = {"name": "sgd", "learning_rate": 0.01, "momentum": 0.9}
    config.learner = {"wrap": ["population"], "population": {"n": SEEDS, "method": "vmap"}, "watch": {}}
    config.evaluate = {"every": 0, "batch": 1000}
    config.train.update({"steps": 20_000, "steps_per_call": 100, "log_every": 1000, "replay": False})
    config.checkpoint.update({"every": 5000})
    if arg == "smoke":
        config.data.samples = 2000
        config.train.update({"steps": 20, "steps_per_call": 5, "log_every": 10})
        config.checkpoint.every = 10
    return config
