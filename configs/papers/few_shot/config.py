"""Five-way one-shot and five-shot learning of letters of unseen scripts: MAML (Finn et al. 2017, arXiv 1703.03400),
prototypical networks (Snell et al. 2017, 1703.05175), ridge heads (R2-D2, Bertinetto et al. 2019, 1805.08136) and matching
networks (Vinyals et al. 2016, 1606.04080), beside a nearest neighbour of pixels, which learns nothing.

    gnomon data noto-fonts                               # once: the fonts that letters are rendered from
    gnomon reproduce few_shot                            # all rows of the table
    gnomon train --config configs/papers/few_shot/config.py:prototypical_1

Letters are those of `research.data.glyphs`, 28 x 28, 20 drawings each; training, validation and test have scripts of their own.
All methods learn the same network, four 3 x 3 convolutions of 32 channels with group normalization, by Adam on the same
episodes. "val" and "test" are 600 episodes of 5 ways with 5 queries each, with the 95% interval over episodes, "pixels" the
same test episodes by the nearest neighbour of pixels. Time: see results.jsonl beside this file; some minutes each on 2 cores.
"""

from ml_collections import ConfigDict

METHODS = ("maml", "prototypical", "ridge", "matching")
ARGS = ("smoke", *(f"{method}_{shots}" for method in METHODS for shots in (1, 5)))


def get_config(arg: str = "") -> ConfigDict:
    method, _, shots = (arg if arg not in ("", "smoke") else "prototypical_1").partition("_")
    config = ConfigDict(
        {
            "seed": 0,
            "data": {"name": "glyphs"},  # or any of research/data/few_shot.py, such as {"name": "omniglot", "path": "..."}
            "episodes": {"ways": 5, "shots": int(shots), "queries": 5},
            "method": method,
            "maml": {"learning_rate": 0.4, "steps": 3, "order": "second"},
            "ridge": {"regularization": 1.0, "scale": 10.0},
            "matching": {"temperature": 0.1},
            "widths": [32, 32, 32, 32],
            "optimizer": {"name": "adamw", "learning_rate": 2e-3, "schedule": {"name": "cosine", "warmup": 50}},
            "tasks": 4,  # episodes a step
            "test_episodes": 600,
            "train": {"steps": 2000 if method == "maml" else 1000, "log_every": 100},
            "evaluate": {"every": 500},
            "checkpoint": {"every": 500},
        }
    )
    if arg == "smoke":
        config.data.name = "letters"
        config.widths = [4, 4]
        config.test_episodes = 20
        config.train.update({"steps": 4, "log_every": 2})
        config.evaluate.every = 0
        config.optimizer.schedule.warmup = 2
        config.checkpoint.every = 2
    return config


def build(config: ConfigDict):
    from research import Experiment, optim
    from research.core.names import choose
    from research.core.types import Evaluation, Stage
    from research.data.episodes import episodes
    from research.data.few_shot import SOURCES
    from research.evals import episode_accuracy, nearest_neighbour
    from research.experiment.sections import arguments, called
    from research.learners import gradient
    from research.models import cnn
    from research.tasks import classification
    from research.transforms import over_tasks

    ways, queries = config.episodes.ways, config.episodes.queries
    parts = called(SOURCES, config.data, "data")
    shape = parts["train"].x.shape[1:]
    method = choose(HEADS, config.method, "method")

    model = cnn(
        shape=shape, outputs=ways, widths=config.widths, blocks=1, normalization="group", residual=False, dropout=0.0,
        dtype="float32", convolution="patches",
    )  # fmt: skip
    task = classification(model, batch=ways * queries, shape=shape, label_smoothing=0.0)
    support = ways * config.episodes.shots

    def drawn(part, tasks, seed, length=None):
        return episodes(parts[part], tasks, **arguments(config.episodes), seed=seed, length=length)

    learner = gradient(
        over_tasks(method(task, config, support), config.tasks),
        optim.make(arguments(config.optimizer), steps=config.train.steps),
    )
    test = min(20, config.test_episodes)
    tested = over_tasks(method(task, config, support), test).methods["predict"].apply
    held_out = {part: drawn(part, test, 10**6 + config.seed, config.test_episodes) for part in ("validation", "test")}
    return Experiment(
        [Stage(learner, drawn("train", config.tasks, config.seed), config.train.steps)],
        {
            "val": Evaluation(episode_accuracy(tested), held_out["validation"], config.evaluate.every),
            "test": Evaluation(episode_accuracy(tested), held_out["test"], 0),
            "pixels": Evaluation(episode_accuracy(nearest_neighbour(ways)), held_out["test"], 0),
        },
        seed=config.seed,
        log_every=config.train.log_every,
        replay=False,
        checkpoints={"every": config.checkpoint.every},
        units={"episodes": config.tasks},
        show=["val/accuracy"],
    )


def _maml(task, config, support):
    import optax

    from research.nn import checks
    from research.transforms import maml

    own = config.maml
    checks.not_negative("maml.learning_rate", own.learning_rate)
    return maml(task, optax.sgd(own.learning_rate), own.steps, order=own.order, support=support)


def _prototypical(task, config, support):
    from research.transforms import prototypical

    return prototypical(task, config.episodes.ways, method="embed", support=support)


def _ridge(task, config, support):
    from research.transforms import ridge_head

    return ridge_head(task, config.episodes.ways, method="embed", support=support, **config.ridge)


def _matching(task, config, support):
    from research.transforms import matching

    return matching(task, config.episodes.ways, method="embed", support=support, **config.matching)


HEADS = {"maml": _maml, "prototypical": _prototypical, "ridge": _ridge, "matching": _matching}
