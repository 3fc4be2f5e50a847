"""A learned optimizer against Adam (after Metz et al. 2022, arXiv 2203.11860, and Vicol et al. 2021, arXiv 2112.13835).

    gnomon reproduce learned_optimizer
    gnomon train --config configs/papers/learned_optimizer/config.py           # what others then use by its workdir

An MLP on features of each parameter learns to train an MLP of width 32 on Fashion-MNIST at 8x8, by persistent evolution
strategies on truncations of 50 steps of episodes of 100 to 300. Then it races Adam on seeds that it has not seen, on the same
task and on one it has not seen: another width on MNIST-1D. Adam has the best of 16 learning rates for these very seeds.

`:tune` races on examples held out of the training parts instead of on the test parts; what is in `get_config` was chosen by it.
Needs Fashion-MNIST (`gnomon data fashion-mnist`). Time: see results.jsonl beside this file.

`optimizer = {"name": "learned", "path": <the workdir>, "learning_rate": 1.0}` uses the result in any other config.
"""

from ml_collections import ConfigDict

from configs.base import base

ARGS = ("smoke", "race", "tune")
HELD_OUT = {"fashion_mnist": 10_000, "mnist1d": 1_000}  # examples of the training parts that are for choices alone


def get_config(arg: str = "") -> ConfigDict:
    config = base()
    config.family = {"name": "fashion_mnist", "hidden": [32], "batch": 128}
    config.learned_optimizer = {
        "name": "per_parameter_mlp",
        "version": 1,
        "hidden": 4,
        "layers": 2,
        "step": 1e-3,
        "exponent": 1e-3,
        "nominal": 3e-3,
        "output": 0.0,
    }
    config.unroll = {"length": 50, "highest": 3.5}
    config.estimate = {"name": "pes", "sigma": 0.01, "pairs": 16, "horizon": [2, 6], "wrap": []}
    config.optimizer = {"name": "adamw", "learning_rate": 3e-3, "clip": 1.0, "schedule": {"name": "cosine", "final": 0.1}}
    config.train.update({"steps": 4000, "steps_per_call": 20, "log_every": 100, "replay": False})
    config.checkpoint.update({"every": 500})
    config.race = {
        "part": "validation" if arg == "tune" else "test",
        "steps": 300,
        "seeds": 10,
        "slowest": 1e-4,
        "fastest": 1e-1,
        "rates": 16,
        "examples": 2000,
        "other": {"name": "mnist1d", "hidden": [64], "batch": 128},
    }
    if arg == "smoke":
        config.family.update({"name": "mnist1d", "hidden": [8], "batch": 16})
        config.race.other.update({"hidden": [6], "batch": 16})
        config.race.update({"steps": 20, "seeds": 2, "rates": 3, "examples": 50})
        config.learned_optimizer = {"name": "learned_scales", "version": 1, "base": "adam", "learning_rate": 1e-2}
        config.unroll.length = 5
        config.estimate.pairs = 2
        config.train.update({"steps": 4, "steps_per_call": 2, "log_every": 2})
        config.checkpoint.every = 2
    return config


def build(config: ConfigDict):
    from research import Experiment
    from research.core.batches import nothing
    from research.core.types import Stage
    from research.experiment.sections import arguments
    from research.experiment.wrapping import learner_of
    from research.optim.learned import learned_optimizer
    from research.transforms import unroll

    for name in ("steps", "seeds", "rates", "examples"):
        if config.race[name] < 1:
            raise ValueError(f"race.{name}={config.race[name]}; allowed: 1 or more")
    if not 0 < config.race.slowest <= config.race.fastest:
        raise ValueError(f"race.slowest={config.race.slowest}; allowed: above 0, up to race.fastest={config.race.fastest}")
    made = learned_optimizer(arguments(config.learned_optimizer))
    seen, _ = families(config.family, "validation", config.race.examples)  # never what is held out
    task = unroll(seen, made, config.unroll.length, horizon=config.race.steps, highest=config.unroll.highest)
    races = {"race": race(config, config.family, made), "other_race": race(config, config.race.other, made)}
    return Experiment(
        [Stage(learner_of(config, task), nothing(), config.train.steps)],
        races,
        seed=config.seed,
        steps_per_call=config.train.steps_per_call,
        log_every=config.train.log_every,
        replay=config.train.replay,
        checkpoints={"every": config.checkpoint.every, "keep_latest": config.checkpoint.keep_latest},
        units={"unrolls": 2 * config.estimate.pairs},
    )


def families(section, part: str, examples: int):
    """(family to train on, family to measure on) of a data set: for "validation" both are of the training part, apart."""
    import numpy as np

    from research.core.names import choose
    from research.data.fashion_mnist import fashion_mnist
    from research.data.mnist1d import mnist1d
    from research.tasks.families import classifiers, shrunk

    def images(x, y):
        return shrunk(x), y

    sets = {"fashion_mnist": (fashion_mnist, images, 1 / 255), "mnist1d": (mnist1d, lambda x, y: (x, y), 1.0)}
    load, form, scale = choose(sets, section.name, "family.name")
    parts = load()
    (x, y), test = form(*parts["train"]), form(*parts["test"])
    cut = len(y) - HELD_OUT[section.name]
    order = np.random.default_rng(0).permutation(len(y))
    split = {
        "validation": ((x[order[:cut]], y[order[:cut]]), (x[order[cut:]], y[order[cut:]])),
        "test": ((x, y), test),
    }
    learn, measure = choose(split, part, "race.part")
    hidden = list(section.hidden)
    return classifiers(*learn, section.batch, hidden, scale=scale), classifiers(*measure, examples, hidden, scale=scale)


def race(config: ConfigDict, section, made):
    """An Evaluation of `race.steps` steps from each of `race.seeds` seeds, by the learned optimizer and by Adam at each rate:
    the loss on new examples after them, and the mean loss of training. A batch is a seed, which all share, and the examples.
    A ratio below 1: what was learned is better than Adam at the rate that is best for these very seeds by that measure."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from research.core.batches import from_function
    from research.core.types import Evaluation, Evaluator
    from research.transforms.unroll import fresh, stepped

    learn, measure = families(section, config.race.part, config.race.examples)
    rates = np.geomspace(config.race.slowest, config.race.fastest, config.race.rates).astype(np.float32)

    def trained(tx, batch, key):
        k_fresh, k_steps, k_measure = jax.random.split(key, 3)
        state, losses = stepped(learn, tx, batch["learn"], fresh(learn, tx, k_fresh), k_steps, config.race.steps)
        unseen = measure.batch({}, batch["measure"], k_measure)
        loss, _ = measure.task({}).loss(state["inner"], unseen, k_measure)
        both = jnp.stack([loss, losses.mean()])
        return jnp.where(jnp.isfinite(both), both, jnp.inf)

    def init():
        return {
            "learned": np.zeros(2, np.float32),
            "adam": np.zeros((len(rates), 2), np.float32),
            "seeds": np.zeros((), np.float32),
        }

    def update(stats, variables, batch, key):
        key = jax.random.key(batch["seed"])
        learned = trained(made.transformation(variables["params"]), batch, key)
        adam = jax.lax.map(lambda rate: trained(optax.adam(rate), batch, key), jnp.asarray(rates))
        return {"learned": stats["learned"] + learned, "adam": stats["adam"] + adam, "seeds": stats["seeds"] + 1}

    def finalize(stats):
        with np.errstate(invalid="ignore", divide="ignore"):
            learned, adam = (np.asarray(stats[name]) / stats["seeds"] for name in ("learned", "adam"))
        best = adam.min(0)
        told = {"loss": 0, "training_loss": 1}
        found = {f"{name}_learned": float(learned[i]) for name, i in told.items()}
        found |= {f"{name}_adam": float(best[i]) for name, i in told.items()}
        found |= {f"{name}_ratio": float(learned[i] / best[i]) for name, i in told.items()}
        return found | {"best_rate": float(rates[adam[:, 0].argmin()])}

    data = {name: jax.tree.map(np.asarray, f.data) for name, f in {"learn": learn, "measure": measure}.items()}
    first = 1000 * (config.seed + 1)
    seeds = from_function(lambda i: {"seed": np.int32(first + i), **data}, config.race.seeds, f"seeds from {first}")
    return Evaluation(Evaluator(init, update, finalize), seeds, 0)
