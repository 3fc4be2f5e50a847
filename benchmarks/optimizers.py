"""A race of optimizers, each tuned on the same budget: steps and seconds to AdamW's test loss.

    gnomon bench optimizers                              # all three races; it says first how long they will take
    gnomon bench optimizers -- --work gru                # one of them
    gnomon bench optimizers --dry-run -- --quick         # a minute: two optimizers, few steps, trials and seeds

Work: gru, the MNIST-1D GRU; vit, the Fashion-MNIST ViT at batch 16; lm, the byte-level transformer of lm/stdlib.py at its
smoke size.

For each optimizer TRIALS learning rates are drawn log-uniformly over two decades around where its authors use it, the same
quantiles for all. The one of the lowest validation loss at the end of its run is run again from SEEDS other initializations,
which are measured on test data: all that is reported but the learning rate.
All else is the config's or the optimizer's default: no weight decay, no clipping, a warmup of 5% and a cosine to 0, for the
schedule-free one a warmup alone.

The target of a work is the median over seeds of AdamW's last test loss. A seed that never reaches it counts as infinitely
many steps in the median, and in "reached". Seconds are steps times the seconds of a step of one member alone, timed after
compiling and with preconditioners refreshed as often as in a run.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from benchmarks.harness import run
from configs.lm import stdlib
from configs.papers.mnist1d import config as mnist1d
from configs.vision import fashion_mnist
from research.core.batches import from_function
from research.core.evaluate import evaluator_run
from research.core.loop import Program, compiled
from research.core.names import choose
from research.core.types import Evaluation
from research.experiment import Experiment, build

NEEDS_PEERS = False
TRIALS, SEEDS = 9, 5
LARGEST = 512  # a longer side is not preconditioned: that of n-gram tables alone, as long as their hashes
PLOTS = Path(__file__).resolve().parent.parent / "docs"

# name: (the middle of its learning rates, its keys)
OPTIMIZERS: Mapping[str, tuple[float, Mapping[str, Any]]] = {
    "adamw": (3e-3, {}),
    "sgd": (0.1, {"momentum": 0.9}),
    "lion": (3e-4, {}),
    "adafactor": (3e-2, {"parameter_scale": False}),
    "muon": (3e-3, {"scale": "rms", "dtype": "float32"}),
    "soap": (3e-3, {"largest": LARGEST}),
    "shampoo": (3e-3, {}),
    "psgd_kron": (1e-3, {"largest": LARGEST}),
    "schedule_free": (3e-3, {}),
    "prodigy": (1.0, {}),
}


class Work(NamedTuple):
    """config: the module's config, before an optimizer is put in. tuning, reporting: prefixes of its evaluations; measure: the
    loss's name in both. test_part: 1 in so many test batches is measured, evenly apart."""

    title: str
    config: Any
    tuning: str
    measure: str
    steps: int
    every: int
    test_part: int = 1
    reporting: str = "test"


def works() -> dict[str, Work]:
    gru = mnist1d.get_config("gru")
    gru.stream.validation = 500
    gru.evaluate.batch = 500
    vit = fashion_mnist.get_config("vit")
    vit.stream.batch = 16
    lm = stdlib.get_config("smoke")
    lm.evaluate.every = 30
    return {
        "gru": Work("MNIST-1D GRU", gru, "val", "nll", 1500, 50),
        "vit": Work("Fashion-MNIST ViT, batch 16", vit, "val", "nll", 400, 40, test_part=5),
        "lm": Work("lm/stdlib.py at its smoke size", lm, "val_part", "bits_per_byte", 300, 30, test_part=9),
    }


def schedule(name: str) -> dict[str, Any]:
    return {"name": "constant" if name == "schedule_free" else "cosine", "warmup": 0.05}


def experiment(work: Work, name: str, rates: list[float] | None, steps: int) -> Experiment:
    """The work under an optimizer: of a population of one member a rate, or alone where rates is None."""
    config = work.config.copy_and_resolve_references()
    middle, keys = choose(OPTIMIZERS, name, "optimizer")
    with config.unlocked():
        config.optimizer = {"name": name, "learning_rate": middle, "schedule": schedule(name), **keys}
        config.learner = {"wrap": [], "watch": {}}
        if rates is not None:
            # one after another, since vmap would refresh every preconditioner at every step
            members = {"n": len(rates), "method": "map", "vary": {"learning_rate": rates}}
            config.learner = {"wrap": ["population"], "population": members, "watch": {}}
        config.train.steps = steps
        config.checkpoint.update({"keep_best": 0, "best": ""})
    return build(FrozenConfigDict(config))


def stacked(drawn: Any, n: int) -> Any:
    return jax.tree.map(lambda *x: np.stack(x), *(next(drawn) for _ in range(n)))


def one_in(evaluation: Evaluation, n: int) -> Evaluation:
    """Every n-th batch of it alone."""
    batches = list(itertools.islice(evaluation.batches.open(), 0, None, n))
    return evaluation._replace(batches=from_function(batches.__getitem__, len(batches)))


def curves(work: Work, name: str, rates: list[float], steps: int, key: jax.Array, prefix: str) -> np.ndarray:
    """Losses [evaluations, members] of the evaluation `prefix`; NaN where a member has diverged. Every `work.every` steps for
    what is reported, at the end alone for what tunes."""
    made = experiment(work, name, rates, steps)
    learner, batches, _, _ = made.stages[0]
    measured, reported = made.evaluations[prefix], prefix == work.reporting
    evaluate = evaluator_run(one_in(measured, work.test_part) if reported else measured)
    program = compiled(learner, None)
    state, drawn, seen = program.init(key, None), batches.open(), []
    for done in range(work.every, steps + 1, work.every):
        state, _ = program.step(state, program.put(stacked(drawn, work.every)), work.every, key)
        if reported or done == steps:
            seen.append(np.asarray(evaluate(learner.variables(state), key)[work.measure], np.float64))
    return np.stack(seen)


def seconds_a_step(work: Work, name: str, rounds: int) -> float:
    """The median over `rounds` calls of `work.every` steps, after one that compiles."""
    made = experiment(work, name, None, work.every * (rounds + 1))
    program: Program = compiled(made.stages[0].learner, None)
    key = jax.random.key(0)
    state, drawn, times = program.init(key, None), made.stages[0].batches.open(), []
    for _ in range(rounds + 1):
        batches = program.put(stacked(drawn, work.every))
        began = time.perf_counter()
        state, _ = jax.block_until_ready(program.step(state, batches, work.every, key))
        times.append((time.perf_counter() - began) / work.every)
    return statistics.median(times[1:])


def learning_rates(name: str, trials: int) -> list[float]:
    """Log-uniform over a decade on each side of the optimizer's middle: one draw in each of `trials` equal parts, the same for
    all optimizers."""
    parts = (np.arange(trials) + np.random.default_rng(0).uniform(size=trials)) / trials
    return [float(x) for x in OPTIMIZERS[name][0] * 10 ** (2 * parts - 1)]


def steps_to(target: float, losses: np.ndarray, every: int) -> np.ndarray:
    """The first evaluation at which each member's loss is `target` or less, in steps; infinite where there is none."""
    reached = losses <= target
    return np.where(reached.any(0), (reached.argmax(0) + 1) * every, np.inf)


def said(value: float) -> float | str:
    return float(f"{value:.4g}") if np.isfinite(value) else "not reached"


def race(work: Work, steps: int, trials: int, seeds: int, times: Mapping[str, float]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(facts by optimizer, curves by optimizer: [seeds][evaluations])."""
    tuned, runs = {}, {}
    for name in times:
        began = time.perf_counter()
        rates = learning_rates(name, trials)
        last = curves(work, name, rates, steps, jax.random.key(1), work.tuning)[-1]
        tuned[name] = rates[int(np.argmin(np.where(np.isfinite(last), last, np.inf)))]
        runs[name] = curves(work, name, [tuned[name]] * seeds, steps, jax.random.key(0), work.reporting)
        say(f"  {name}: rate {tuned[name]:.3g}, test loss {np.median(runs[name][-1]):.4f}, {time.perf_counter() - began:.0f} s")
    target = float(np.median(runs["adamw"][-1]))
    facts = {}
    for name, losses in runs.items():
        needed = steps_to(target, losses, work.every)
        middle = tuned[name] / OPTIMIZERS[name][0]
        facts[name] = {
            "learning rate": said(tuned[name]),
            "learning rate is at the edge of its range": bool(
                middle < 10 ** (-1 + 2 / trials) or middle > 10 ** (1 - 2 / trials)
            ),
            "last test loss, median": said(np.median(losses[-1])),
            "last test loss, range": [said(losses[-1].min()), said(losses[-1].max())],
            "steps to AdamW's loss, median": said(np.median(needed)),
            "seconds to AdamW's loss, median": said(np.median(needed) * times[name]),
            "seeds that reached it": f"{int(np.isfinite(needed).sum())} of {seeds}",
            "milliseconds a step": said(1e3 * times[name]),
        }
    return facts, {name: [[said(x) for x in member] for member in losses.T] for name, losses in runs.items()}


def say(text: str) -> None:
    print(f"{time.strftime('%X')} {text}", file=sys.stderr, flush=True)


def draw(row: dict[str, Any], path: Path) -> None:
    """Medians over seeds, the range shaded."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 4.5))
    for name, members in row["curves"].items():
        losses = np.array([[x if isinstance(x, float) else np.nan for x in member] for member in members])
        at = row["every"] * np.arange(1, losses.shape[1] + 1)
        (line,) = ax.plot(at, np.nanmedian(losses, 0), label=name)
        ax.fill_between(at, np.nanmin(losses, 0), np.nanmax(losses, 0), color=line.get_color(), alpha=0.15)
    ax.set(title=row["work"], xlabel="steps", ylabel="test loss", yscale="log")
    ax.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(work: Sequence[str] | None, quick: bool) -> list[dict[str, Any]]:
    chosen = {name: w for name, w in works().items() if work is None or name in work}
    trials, seeds, rounds, names = TRIALS, SEEDS, 5, list(OPTIMIZERS)
    if quick:
        chosen = {name: w._replace(steps=20, every=10) for name, w in chosen.items()}
        trials, seeds, rounds, names = 2, 2, 1, ["adamw", "soap"]
    times = {work: {name: seconds_a_step(w, name, rounds) for name in names} for work, w in chosen.items()}
    total = sum((trials + seeds) * chosen[work].steps * s for work, own in times.items() for s in own.values())
    say(f"{len(names)} optimizers, {trials} trials and {seeds} seeds each: about {total / 60:.0f} minutes, and compiling")
    rows = []
    for name, w in chosen.items():
        say(f"{w.title}, {w.steps} steps")
        facts, seen = race(w, w.steps, trials, seeds, times[name])
        rows.append({"work": f"{w.title}, {w.steps} steps", "facts": facts, "every": w.every, "curves": seen})
        if not quick:
            draw(rows[-1], PLOTS / f"optimizers_{name}.png")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", nargs="+", choices=list(works()), help="which races; all, unless said")
    parser.add_argument("--quick", action="store_true", help="two optimizers, 20 steps, 2 trials and 2 seeds: no measurement")
    run(main, parser)
