"""Which gradients of a long episode are biased (Vicol et al. 2021, arXiv 2112.13835, section 5: influence balancing).

    gnomon reproduce pes

Of 200 steps of influence balancing (`tasks.influence_balancing`) at theta = 0.5 the gradient is known. Each estimate sees the
episode in truncations of one step, and its mean over the episode is compared: truncated backpropagation and truncated ES have
the wrong sign, PES and noise-reuse ES are right within their standard error. Nothing is trained; the evaluation measures.
"""

from ml_collections import ConfigDict

ARGS = ("smoke", "bias")


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(
        {
            "seed": 0,
            "episode": 200,
            "sigma": 0.1,
            "pairs": 1000 if arg != "smoke" else 10,
            "repeats": 16 if arg != "smoke" else 2,
        }
    )


def build(config: ConfigDict):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from research import Experiment
    from research.core.batches import from_function, nothing
    from research.core.types import Evaluation, Evaluator, Stage
    from research.estimates import es, exact, noise_reuse, pes, truncated
    from research.learners import forward
    from research.tasks import influence_balancing

    T, sigma, pairs = config.episode, config.sigma, config.pairs
    whole, short = influence_balancing(T), influence_balancing(1)
    estimates = {
        "backpropagation": truncated(T, staggered=False),
        "truncated_es": truncated(T, es(sigma, pairs), staggered=False),
        "pes": pes(sigma, pairs, T, staggered=False),
        "noise_reuse": noise_reuse(sigma, pairs, T, staggered=False),
    }

    def over_the_episode(estimate, variables, key):
        """The mean of the estimate over the truncations of one episode."""

        def call(memory, key):
            _, _, gradients, memory = estimate.grads(memory, short, variables, {}, key)
            return memory, gradients["theta"]

        return jax.lax.scan(call, estimate.init(short, variables, key), jax.random.split(key, T))[1].mean()

    def init():
        none = {name: np.zeros(2, np.float32) for name in estimates}
        return {"exact": np.zeros((), np.float32), "sums": none, "repeats": np.zeros((), np.float32)}

    def update(stats, variables, batch, key):
        key = jax.random.key(batch["seed"])
        variables = whole.init(key)  # the episode from its start, where the step of the run has not been
        true = exact().grads({}, whole, variables, {}, key)[2]["theta"]
        found = {name: over_the_episode(e, variables, key) for name, e in estimates.items()}
        sums = {name: stats["sums"][name] + jnp.stack([x, (x - true) ** 2]) for name, x in found.items()}
        return {"exact": stats["exact"] + true, "sums": sums, "repeats": stats["repeats"] + 1}

    def finalize(stats):
        n = float(stats["repeats"])
        with np.errstate(invalid="ignore", divide="ignore"):
            true = stats["exact"] / np.float32(n)
            out = {"exact": float(true)}
            for name, (total, squares) in stats["sums"].items():
                bias = total / np.float32(n) - true
                error = np.sqrt(np.maximum(squares / np.float32(n) - bias**2, 0) / np.float32(max(n - 1, 1)))
                out |= {name: float(total / np.float32(n)), f"{name}_error": float(error)}
                out[f"{name}_errors_off"] = float(np.abs(bias) / error) if n and error > 0 else float("nan")
        return out

    repeats = from_function(lambda i: {"seed": np.int32(1000 * config.seed + i)}, config.repeats, f"repeats from {config.seed}")
    bias = Evaluation(Evaluator(init, update, finalize), repeats, 0)
    return Experiment([Stage(forward(whole), nothing(), 1)], {"gradient": bias}, seed=config.seed, log_every=1)
