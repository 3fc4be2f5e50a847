"""Sinusoids from ten points: MAML (Finn et al. 2017, arXiv 1703.03400, section 5.1) and Meta-SGD (Li et al. 2017, 1707.09835).

    gnomon reproduce maml_sine                          # both, every seed of one at once
    gnomon train --config configs/papers/maml_sine/config.py:meta_sgd

Protocol: a sin(x - p) with a in [0.1, 5], p in [0, pi], x in [-5, 5]; an MLP of 40, 40 with ReLU; one inner step of 0.01 on 10
points; 70,000 steps of Adam at 0.001 on 25 tasks each with 10 query points; then the mean squared error of 600 new tasks after
one step, each on 100 query points. Every step draws its tasks, so nothing is read. Time: see results.jsonl beside this file.
"""

from ml_collections import ConfigDict

ARGS = ("smoke", "maml", "meta_sgd")


def get_config(arg: str = "") -> ConfigDict:
    config = ConfigDict(
        {
            "seed": 0,
            "method": "meta_sgd" if arg == "meta_sgd" else "maml",
            "inner": {"learning_rate": 0.01, "steps": 1},
            "tasks": 25,
            "points": {"support": 10, "query": 10, "test": 100},
            "test_tasks": 600,
            "hidden": [40, 40],
            "learning_rate": 0.001,
            "members": 3,  # seeds, trained at once
            "train": {"steps": 70_000, "steps_per_call": 1000, "log_every": 5000},
            "checkpoint": {"every": 35_000},
        }
    )
    if arg == "smoke":
        config.train.update({"steps": 20, "steps_per_call": 5, "log_every": 10})
        config.checkpoint.every = 10
        config.test_tasks = 100
    return config


def build(config: ConfigDict):
    import optax

    from research import transforms
    from research.core.names import choose
    from research.experiment.meta import meta
    from research.nn import checks
    from research.tasks.families import sinusoids

    inner = config.inner
    checks.not_negative("inner.learning_rate", inner.learning_rate)
    checks.not_negative("learning_rate", config.learning_rate)
    methods = {
        "maml": lambda task, **own: transforms.maml(task, optax.sgd(inner.learning_rate), inner.steps, **own),
        "meta_sgd": lambda task, **own: transforms.meta_sgd(task, inner.learning_rate, inner.steps, **own),
    }
    method = choose(methods, config.method, "method")
    return meta(config, lambda batch: sinusoids(batch, config.hidden), method, optax.adam(config.learning_rate))
