"""Lottery tickets on MNIST-1D (Greydanus and Kobak 2020, arXiv 2011.14439; Frankle and Carbin 2019, arXiv 1803.03635).

    gnomon reproduce mnist1d_lottery                       # ticket, random mask and dense, every seed of one at once
    gnomon train --config configs/papers/mnist1d_lottery/config.py:ticket

A ticket is found by training, leaving out the smallest weights of each layer, taking the others back to where they began, and
training again, until 92% are left out: a stage each. It learns better than the dense network, and a network of as many
weights chosen at random learns worse. Protocol, from the paper's notebook: hidden layers of 500, the second one residual; 1,500
steps of Adam at 0.02 with batches of 100 in each stage. `members` seeds are one population, with a mask each. Time: see
results.jsonl beside this file; 15 minutes for the tickets on 2 cores, a minute for the others.
"""

from ml_collections import ConfigDict

ARGS = ("smoke", "ticket", "random", "dense")
SPARSITY, ROUNDS = 0.92, 24
SCHEDULES = {
    "ticket": [SPARSITY * i / (ROUNDS - 1) for i in range(ROUNDS)],
    "random": [SPARSITY],
    "dense": [0.0],
}


def get_config(arg: str = "") -> ConfigDict:
    kind = arg if arg in SCHEDULES else "ticket"
    config = ConfigDict(
        {
            "seed": 0,
            "keep": "random" if kind == "random" else "magnitude",
            "sparsities": SCHEDULES[kind],  # the share of weights left out, a stage each
            "hidden": [500, 500],
            "learning_rate": 0.02,
            "batch": 100,
            "members": 3,
            "train": {"steps": 1500, "steps_per_call": 50, "log_every": 500},
            "checkpoint": {"every": 0},
        }
    )
    if arg == "smoke":
        config.update({"hidden": [16, 16], "sparsities": [0.0, 0.5]})
        config.train.update({"steps": 10, "steps_per_call": 5, "log_every": 5})
    return config


def build(config: ConfigDict):
    import functools

    import jax
    import optax

    from research import Experiment
    from research.core.names import choose
    from research.core.types import Evaluation, Stage
    from research.data.mnist1d import LENGTH, mnist1d_sources
    from research.data.streams import ordered_batches, train_batches
    from research.evals import accuracy
    from research.learners import gradient, members, population
    from research.models import mlp
    from research.tasks import classification

    score = choose(SCORES, config.keep, "keep")
    for sparsity in config.sparsities:
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsities={list(config.sparsities)}: given {sparsity}, allowed 0 or more, below 1")
    model = mlp(
        shape=[LENGTH], outputs=10, hidden=config.hidden, activation="relu", residual=True, dropout=0.0, init="uniform",
        dtype="float32",
    )  # fmt: skip
    task = masked(classification(model, batch=config.batch, shape=[LENGTH], label_smoothing=0.0))
    learner = population(gradient(task, optax.adam(config.learning_rate)), config.members, frozen="own")
    parts = mnist1d_sources()
    batches = train_batches(parts["train"], config.batch, seed=config.seed, remainder="drop")

    def stage(sparsity):
        enter = functools.partial(pruned, task, score, sparsity)
        return Stage(learner, batches, config.train.steps, jax.jit(members(enter, config.members, frozen="own")))

    measured = members(accuracy(task.methods["predict"].apply), config.members, frozen="own")
    return Experiment(
        [stage(sparsity) for sparsity in config.sparsities],
        {"test": Evaluation(measured, ordered_batches(parts["test"], 1000), 0)},
        seed=config.seed,
        steps_per_call=config.train.steps_per_call,
        log_every=config.train.log_every,
        replay=False,
        checkpoints={"every": config.checkpoint.every},
        units={"examples": config.batch * config.members},
    )


def masked(task):
    """The task with its params times frozen["mask"]; frozen["begin"] is where they began, frozen["task"] the task's own."""
    import jax
    import jax.numpy as jnp

    def init(key):
        variables = task.init(key)
        params = variables["params"]
        return {
            **variables,
            "frozen": {"task": variables["frozen"], "begin": params, "mask": jax.tree.map(jnp.ones_like, params)},
        }

    def inside(variables):
        frozen = variables["frozen"]
        params = jax.tree.map(jnp.multiply, variables["params"], frozen["mask"])
        return {**variables, "params": params, "frozen": frozen["task"]}

    def within(apply):
        return lambda variables, inputs, key: apply(inside(variables), inputs, key)

    axes = {**task.axes, "frozen": {"task": task.axes["frozen"], "begin": task.axes["params"], "mask": task.axes["params"]}}
    methods = {name: method._replace(apply=within(method.apply)) for name, method in task.methods.items()}
    return task._replace(init=init, loss=within(task.loss), methods=methods, axes=axes)


def pruned(task, score, sparsity, variables, key):
    """An `enter`: the params as they began, under a mask that leaves out the share `sparsity` of each layer, kernel and bias
    together, that scores least. Begins anew where there are no variables yet."""
    import jax
    import jax.numpy as jnp

    from research.core.tree import leaves_with_paths, map_with_path

    k_init, k_score = jax.random.split(key)
    variables = task.init(k_init) if variables is None else variables
    frozen = variables["frozen"]
    layers = {}
    for path, x in leaves_with_paths(jax.tree.map(jnp.multiply, variables["params"], frozen["mask"])):
        layers.setdefault(path[:-1], []).append((path, x))
    masks = {}
    for i, leaves in enumerate(layers.values()):
        scores = score(jnp.concatenate([x.ravel() for _, x in leaves]), jax.random.fold_in(k_score, i))
        out = jnp.argsort(scores)[: int(sparsity * scores.size)]
        mask, begin = jnp.ones(scores.size).at[out].set(0), 0
        for path, x in leaves:
            masks[path] = mask[begin : begin + x.size].reshape(x.shape)
            begin += x.size
    mask = map_with_path(lambda path, x: masks[path], frozen["mask"])
    return {**variables, "params": frozen["begin"], "frozen": {**frozen, "mask": mask}}


def _magnitude(weights, key):
    import jax.numpy as jnp

    return jnp.abs(weights)


def _random(weights, key):
    import jax

    return jax.random.uniform(key, weights.shape)


SCORES = {"magnitude": _magnitude, "random": _random}
