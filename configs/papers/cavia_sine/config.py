"""Sinusoids from ten points: a context that adapts (CAVIA, Zintgraf et al. 2019, arXiv 1810.03642, section 5.1.1) beside MAML.

    gnomon reproduce cavia_sine                          # both, every seed of one at once
    gnomon train --config configs/papers/cavia_sine/config.py:cavia

Protocol: a sin(x - p) with a in [0.1, 5], p in [0, pi], x in [-5, 5]; an MLP of 40, 40 with ReLU, started as PyTorch starts
them; one inner step on 10 points, of 1.0 for two numbers of context, which begin at 0, or of 0.1 for MAML's params; 50,000
steps of Adam on 25 tasks each with 10 query points, at 0.001 times 0.9 every 5,000; then the mean squared error of 1,000 new
tasks after one step, each on 100 query points. Every step draws its tasks, so nothing is read. Time: see results.jsonl.
"""

from ml_collections import ConfigDict

ARGS = ("smoke", "maml", "cavia")


def get_config(arg: str = "") -> ConfigDict:
    config = ConfigDict(
        {
            "seed": 0,
            "method": "maml" if arg == "maml" else "cavia",
            "context": 2,
            "inner": {"learning_rate": 0.1 if arg == "maml" else 1.0, "steps": 1},
            "tasks": 25,
            "points": {"support": 10, "query": 10, "test": 100},
            "test_tasks": 1000,
            "hidden": [40, 40],
            "learning_rate": 0.001,
            "decay": {"factor": 0.9, "every": 5000},
            "members": 3,  # seeds, trained at once
            "train": {"steps": 50_000, "steps_per_call": 1000, "log_every": 5000},
            "checkpoint": {"every": 25_000},
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
    from research.models.mlp import mlp
    from research.nn import checks
    from research.tasks import regression
    from research.tasks.families import sinusoids

    inner, size = config.inner, config.context
    checks.not_negative("inner.learning_rate", inner.learning_rate)
    checks.not_negative("learning_rate", config.learning_rate)
    tx = optax.sgd(inner.learning_rate)

    def maml(task, **own):
        return transforms.maml(task, tx, inner.steps, **own)

    def cavia(task, **own):
        """The same network, reading `size` numbers more."""
        model = mlp(shape=[1 + size], outputs=1, hidden=config.hidden, activation="relu", residual=False, dropout=0.0,
                    init="uniform", dtype="float32")  # fmt: skip
        wide = regression(model, batch=task.batch["inputs"].shape[0], shape=[1 + size], outputs=1)
        return transforms.cavia(wide, size, tx, inner.steps, **own)

    method = choose({"maml": maml, "cavia": cavia}, config.method, "method")
    rate = optax.exponential_decay(config.learning_rate, config.decay.every, config.decay.factor, staircase=True)
    return meta(config, lambda batch: sinusoids(batch, config.hidden, init="uniform"), method, optax.adam(rate))
