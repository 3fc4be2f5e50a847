"""A race of optimizers, each tuned on the same budget: steps and seconds to AdamW's test loss.

    gnomon bench optimizers                              # all three races; once it has timed steps, it says how long they take
    gnomon bench optimizers -- --work gru                # one of them
    gnomon bench optimizers --dry-run -- --quick         # a minute: two optimizers, few steps, trials and seeds

Work: gru, the MNIST-1D GRU; vit, the Fashion-MNIST ViT at batch 16; lm, the byte-level transformer of lm/stdlib.py at its
smoke size.

For each optimizer TRIALS learning rates are drawn log-uniformly over three decades, the same quantiles for all, around a middle
that stands in OPTIMIZERS beside the few settings that are not its defaults. The one of the lowest validation loss at the end of
its run is run again from SEEDS other initializations, which are measured on test data: all that is reported but the learning
rate. All runs see the same batches; a trial has an initialization of its own, the same for all optimizers. No weight decay, no
clipping of gradients, a warmup of 5% and a cosine to 0, for the schedule-free one a warmup alone. Muon's AdamW, for what is no
hidden matrix, has Muon's learning rate.

The target of a work is the median over seeds of AdamW's last test loss, which AdamW itself may meet before its end. A seed
that never meets it counts as infinitely many steps in the median. Seconds are of one member alone, summed from the first
step to that one: all optimizers take turns of `every` steps over a whole run, after compiling.
"""

from __future__ import annotations

import argparse
import itertools
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
DECADES = 3.0
LARGEST = 512  # a longer side is not preconditioned by SOAP and PSGD: that of n-gram tables alone; Shampoo cuts it into blocks

# name: (the middle of its learning rates, its keys)
OPTIMIZERS: Mapping[str, tuple[float, Mapping[str, Any]]] = {
    "adamw": (3e-3, {}),
    "sgd": (0.1, {"momentum": 0.9}),
    "lion": (3e-4, {}),
    "adafactor": (3e-3, {"parameter_scale": False}),
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

    @property
    def said(self) -> str:
        part = f"1 in {self.test_part} batches of the test data" if self.test_part > 1 else "all test data"
        return f"{self.title}, {self.steps} steps, measured on {part}"


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
        "vit": Work("Fashion-MNIST ViT, batch 16", vit, "val", "nll", 300, 30, test_part=10),
        "lm": Work("lm/stdlib.py at its smoke size", lm, "val_part", "bits_per_byte", 300, 30, test_part=27),
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


def curves(work: Work, name: str, rates: list[float], key: jax.Array, prefix: str) -> np.ndarray:
    """Losses [evaluations, members] of the evaluation `prefix`; infinite where a member has diverged. Every `work.every` steps
    for what is reported, at the end alone for what tunes."""
    made = experiment(work, name, rates, work.steps)
    learner, batches, _, _ = made.stages[0]
    measured, reported = made.evaluations[prefix], prefix == work.reporting
    evaluate = evaluator_run(one_in(measured, work.test_part) if reported else measured)
    program = compiled(learner, None)
    state, drawn, seen = program.init(key, None), batches.open(), []
    for done in range(work.every, work.steps + 1, work.every):
        state, _ = program.step(state, program.put(stacked(drawn, work.every)), work.every, key)
        if reported or done == work.steps:
            seen.append(np.asarray(evaluate(learner.variables(state), key)[work.measure], np.float64))
    return np.nan_to_num(np.stack(seen), nan=np.inf, posinf=np.inf)


def seconds(work: Work, names: Sequence[str]) -> dict[str, np.ndarray]:
    """[turns]: seconds of each turn of `work.every` steps of a run, the optimizers taking turns, each compiled before."""
    runs, key = {}, jax.random.key(0)
    for name in names:
        made = experiment(work, name, None, work.steps)
        program: Program = compiled(made.stages[0].learner, None)
        drawn = made.stages[0].batches.open()
        first = program.put(stacked(drawn, work.every))
        jax.block_until_ready(program.step(program.init(key, None), first, work.every, key))
        runs[name] = [program, program.init(key, None), drawn]
    taken: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(work.steps // work.every):
        for name, (program, state, drawn) in runs.items():
            batches = program.put(stacked(drawn, work.every))
            began = time.perf_counter()
            runs[name][1], _ = jax.block_until_ready(program.step(state, batches, work.every, key))
            taken[name].append(time.perf_counter() - began)
    return {name: np.array(turns) for name, turns in taken.items()}


def learning_rates(name: str, trials: int) -> list[float]:
    """Log-uniform over DECADES around the optimizer's middle: one draw in each of `trials` equal parts, the same for all
    optimizers."""
    parts = (np.arange(trials) + np.random.default_rng(0).uniform(size=trials)) / trials
    return [float(x) for x in OPTIMIZERS[name][0] * 10 ** (DECADES * (parts - 0.5))]


def turns_to(target: float, losses: np.ndarray) -> np.ndarray:
    """[members]: after how many evaluations each one's loss is `target` or less; infinite where it never is."""
    reached = losses <= target
    return np.where(reached.any(0), reached.argmax(0) + 1.0, np.inf)


def said(value: float, otherwise: str = "not reached") -> float | str:
    return float(f"{value:.4g}") if np.isfinite(value) else otherwise


def race(
    work: Work, trials: int, seeds: int, times: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, list[list[float | str]]]]:
    """(facts by optimizer, curves by optimizer: [seeds][evaluations])."""
    tuned, runs = {}, {}
    for name in times:
        began = time.perf_counter()
        rates = learning_rates(name, trials)
        last = curves(work, name, rates, jax.random.key(1), work.tuning)[-1]
        if not np.isfinite(last).any():
            raise RuntimeError(f"{work.title}, {name}: all {trials} trials have diverged")
        tuned[name] = int(np.argmin(last))
        runs[name] = curves(work, name, [rates[tuned[name]]] * seeds, jax.random.key(0), work.reporting)
        say(
            f"  {name}: rate {rates[tuned[name]]:.3g}, test loss {np.median(runs[name][-1]):.4f}, "
            f"{time.perf_counter() - began:.0f} s"
        )
    target = float(np.median(runs["adamw"][-1]))
    adamw = float(np.median(turns_to(target, runs["adamw"])))
    facts = {}
    for name, losses in runs.items():
        turns, milliseconds = turns_to(target, losses), 1e3 * times[name] / work.every
        needed = float(np.median(turns))
        taken = times[name][: int(needed)].sum() if np.isfinite(needed) else np.inf
        facts[name] = {
            "learning rate": said(learning_rates(name, trials)[tuned[name]]),
            "learning rate is at the edge of its range": tuned[name] in (0, trials - 1),
            "last test loss, median": said(np.median(losses[-1]), "diverged"),
            "last test loss, range": [said(losses[-1].min(), "diverged"), said(losses[-1].max(), "diverged")],
            "steps to AdamW's loss, median": said(needed * work.every),
            "AdamW's steps over its": said(adamw / needed) if np.isfinite(needed) else "not reached",
            "seconds to AdamW's loss": said(taken),
            "seeds that reached it": f"{int(np.isfinite(turns).sum())} of {seeds}",
            "milliseconds a step, median": said(np.median(milliseconds)),
            "milliseconds a step, range": [said(milliseconds.min()), said(milliseconds.max())],
        }
    return facts, {name: [[said(x, "diverged") for x in member] for member in losses.T] for name, losses in runs.items()}


def say(text: str) -> None:
    print(f"{time.strftime('%X')} {text}", file=sys.stderr, flush=True)


def draw(row: dict[str, Any], path: Path) -> None:
    """Medians over seeds, the range shaded; a line ends where half of the seeds have diverged."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 4.5))
    for name, members in row["curves"].items():
        losses = np.array([[x if isinstance(x, float) else np.inf for x in member] for member in members])
        at = row["every"] * np.arange(1, losses.shape[1] + 1)
        (line,) = ax.plot(at, np.median(losses, 0), label=name)
        ax.fill_between(at, losses.min(0), losses.max(0), color=line.get_color(), alpha=0.15)
    ax.set(title=row["work"], xlabel="steps", ylabel="test loss", yscale="log")
    ax.title.set_fontsize(9)
    ax.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(work: Sequence[str] | None, quick: bool, plots: str) -> list[dict[str, Any]]:
    chosen = {name: w for name, w in works().items() if work is None or name in work}
    trials, seeds, names = TRIALS, SEEDS, list(OPTIMIZERS)
    if quick:
        chosen = {name: w._replace(steps=20, every=10) for name, w in chosen.items()}
        trials, seeds, names = 2, 2, ["adamw", "soap"]
    times = {name: seconds(w, names) for name, w in chosen.items()}
    total = (trials + seeds) * sum(turns.sum() for own in times.values() for turns in own.values())
    say(f"{len(names)} optimizers, {trials} trials, {seeds} seeds: {total / 60:.0f} minutes of steps, and what else it takes")
    rows = []
    for name, w in chosen.items():
        say(w.said)
        facts, seen = race(w, trials, seeds, times[name])
        rows.append({"work": w.said, "facts": facts, "every": w.every, "curves": seen})
        draw(rows[-1], Path(plots) / f"optimizers_{name}.png")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", nargs="+", choices=list(works()), help="which races; all, unless said")
    parser.add_argument("--quick", action="store_true", help="two optimizers, 20 steps, 2 trials and 2 seeds: no measurement")
    parser.add_argument("--plots", default="runs/optimizers", metavar="FOLDER", help="for curves (default: runs/optimizers)")
    run(main, parser)
