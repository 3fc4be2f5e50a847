"""An optimizer from plain values.

    make({"name": "muon", "learning_rate": 0.02, "adam_learning_rate": 3e-3, "weight_decay": 0.1, "clip": 1.0,
          "schedule": {"name": "wsd", "warmup": 100, "decay": 0.3},
          "groups": {"embed": {"match": "embed", "weight_decay": 0.0}}}, steps=2000)

The chain is: clip by global norm, the optimizer's core, then `scale_by_rates` (weight decay, learning rate, schedule,
groups). docs/optimizers.md says how to choose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optax

from research.core.names import call_checked, choose, keywords, suggestion
from research.core.tree import Path, joined, leaves_with_paths, map_with_path
from research.core.types import Tree
from research.optim import groups as grouping
from research.optim import schedules
from research.optim._matrices import is_matrix
from research.optim.groups import Group
from research.optim.learned import carried, restored
from research.optim.muon import scale_by_muon
from research.optim.psgd_kron import scale_by_psgd_kron
from research.optim.rates import own_values, scale_by_rates
from research.optim.scheduled import Around, prodigy_of, schedule_free_of
from research.optim.shampoo import scale_by_shampoo
from research.optim.soap import scale_by_soap

CONSTANT: Mapping[str, Any] = {"name": "constant"}
NONE: Mapping[str, Any] = {}
MATRIX_FREE = r"(^|/)(\w*embed\w*|tables?|position\w*|(\w+_)?head|\w*norm\w*|conv|copy|bias|scale|\w+_bias)(/|$)"


class Range(NamedTuple):
    """What a number must be, said and tested."""

    said: str
    holds: Callable[[float], bool]


MEAN = Range("0 or above, below 1", lambda x: 0 <= x < 1)  # the share of what is kept in a running mean
POSITIVE = Range("a finite number above 0", lambda x: 0 < x < math.inf)
NOT_NEGATIVE = Range("a finite number, 0 or above", lambda x: 0 <= x < math.inf)
# {keyword of a core: Range}, and where one name means another thing in one of them, {core: the same}.
RANGES: Mapping[str, Range] = {
    **dict.fromkeys(("b1", "b2", "b_statistics", "momentum", "decay", "adam_b1", "adam_b2"), MEAN),
    **dict.fromkeys(("first", "coefficient", "clip_rms"), POSITIVE),
    **dict.fromkeys(("eps", "graft_eps", "adam_eps", "adam_learning_rate", "adam_weight_decay"), NOT_NEGATIVE),
    **dict.fromkeys(("rate", "initial", "power"), NOT_NEGATIVE),
}
OWN_RANGES: Mapping[str, Mapping[str, Range]] = {
    "adafactor": {"decay": POSITIVE},
    "prodigy": {"decay": NOT_NEGATIVE},
    "psgd_kron": {"initial": POSITIVE},
    "shampoo": {"b2": Range("from 0 to 1", lambda x: 0 <= x <= 1)},
}


def _check_ranges(name: str, given: Mapping[str, Any]) -> None:
    """ValueError (one line) on a keyword of the core `name` out of its range; None says nothing."""
    ranges = {**RANGES, **OWN_RANGES.get(name, {})}
    for key, value in given.items():
        if key in ranges and value is not None and not ranges[key].holds(value):
            raise ValueError(f"optimizer.{key}={value} is out of range: {ranges[key].said}")


class Core(NamedTuple):
    """What turns gradients into a direction, of unit learning rate and without weight decay, and the groups it adds after the
    user's own. around: (the core and `scale_by_rates`, the schedule of peak 1) -> what takes their place, of an optimizer that
    must know the schedule or the whole update."""

    transformation: optax.GradientTransformation
    groups: tuple[Group, ...] = ()
    around: Around | None = None


def sgd(*, momentum: float = 0.0, nesterov: bool = False) -> Core:
    """m <- momentum m + g; direction m, or with Nesterov g + momentum m (Sutskever et al. 2013). State: m where momentum
    > 0."""
    return Core(optax.trace(momentum, nesterov) if momentum else optax.identity())


def adamw(*, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, nesterov: bool = False) -> Core:
    """Adam's direction (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1; with Nesterov Dozat 2016); Adam itself where
    the weight decay is 0."""
    return Core(optax.scale_by_adam(b1, b2, eps, nesterov=nesterov))


def rmsprop(*, decay: float = 0.9, eps: float = 1e-8, momentum: float = 0.0) -> Core:
    """g / sqrt(mean square of g + eps) (Tieleman and Hinton 2012, lecture 6.5), then momentum as in `sgd`."""
    scaled = optax.scale_by_rms(decay, eps)
    return Core(optax.chain(scaled, optax.trace(momentum)) if momentum else scaled)


def adagrad(*, initial: float = 0.1, eps: float = 1e-7) -> Core:
    """g / sqrt(initial + sum of squares of g + eps) (Duchi et al. 2011, figure 1)."""
    return Core(optax.scale_by_rss(initial, eps))


def lion(*, b1: float = 0.9, b2: float = 0.99) -> Core:
    """sign(b1 m + (1 - b1) g), m <- b2 m + (1 - b2) g (Chen et al. 2023, arXiv 2302.06675, algorithm 2)."""
    return Core(optax.scale_by_lion(b1, b2))


def adafactor(
    *,
    decay: float = 0.8,
    smallest: int = 128,
    clip_rms: float = 1.0,
    momentum: float = 0.0,
    parameter_scale: bool = True,
    eps: float = 1e-30,
) -> Core:
    """Second moments as outer products of row and column means (Shazeer and Stern 2018, arXiv 1804.04235, algorithm 4).

    decay: exponent of 1 - t^-decay. smallest: matrices with a side below it are not factored. clip_rms: largest root mean
    square of an update. parameter_scale: the learning rate is relative to a parameter's root mean square (at least 1e-3).
    """
    links = [optax.scale_by_factored_rms(True, decay, 0, smallest, eps), optax.clip_by_block_rms(clip_rms)]
    links += [optax.scale_by_param_block_rms()] if parameter_scale else []
    links += [optax.ema(momentum, debias=False)] if momentum else []
    return Core(optax.chain(*links))


def muon(
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    coefficients: str = "jordan",
    steps: int = 5,
    scale: str = "width",
    dtype: str = "bfloat16",
    at_once: int | None = None,
    layouts: Mapping[str, Mapping[str, Any]] = NONE,
    adam_match: str = MATRIX_FREE,
    adam_learning_rate: float | None = None,
    adam_weight_decay: float | None = None,
    adam_b1: float = 0.9,
    adam_b2: float = 0.95,
    adam_eps: float = 1e-8,
) -> Core:
    """Muon for matrices (see `research.optim.muon.scale_by_muon` for its keywords), AdamW for every other parameter:
    those of fewer than 2 axes, empty ones and those whose path `adam_match` is found in. By default these are
    embeddings, tables, positions, heads, norms, short convolutions, biases and scales; a stacked vector [layers, width]
    of another name must be added to it, for its shape is a matrix's.

    adam_learning_rate, adam_weight_decay: of AdamW's parameters, in the state as "learning_rate_adam" and
    "weight_decay_adam"; None is the optimizer's own, which suits scale="rms".
    """
    found = grouping.compiled(adam_match, "optimizer.adam_match")

    def adam(path: Path, leaf: Any) -> bool:
        return not is_matrix(leaf) or bool(found.search(joined(path)))

    def labels(params: Tree) -> Tree:
        named = map_with_path(lambda path, x: "adam" if adam(path, x) else "muon", params)
        if "muon" not in {label for _, label in leaves_with_paths(named)}:
            raise ValueError(f"muon has no parameter: each has fewer than 2 axes or matches adam_match={adam_match!r}")
        return named

    matrices = scale_by_muon(
        momentum=momentum, nesterov=nesterov, coefficients=coefficients, steps=steps, scale=scale, dtype=dtype, at_once=at_once,
        layouts=layouts,
    )  # fmt: skip
    both = optax.partition({"muon": matrices, "adam": optax.scale_by_adam(adam_b1, adam_b2, adam_eps)}, labels)
    return Core(both, (Group("adam", adam, None, adam_learning_rate, None, adam_weight_decay),))


def soap(
    *, b1: float = 0.95, b2: float = 0.95, b_statistics: float = 0.95, eps: float = 1e-8, every: int = 10, largest: int = 10000
) -> Core:
    """Adam in the eigenbasis of Shampoo's statistics (Vyas et al. 2024); see `research.optim.soap.scale_by_soap`."""
    return Core(scale_by_soap(b1=b1, b2=b2, b_statistics=b_statistics, eps=eps, every=every, largest=largest))


def shampoo(
    *, b1: float = 0.9, b2: float = 0.99, eps: float = 1e-6, every: int = 10, start: int = 1, block: int = 256,
    graft: str = "adam", graft_eps: float = 1e-8,
) -> Core:  # fmt: skip
    """Inverse fourth roots of statistics of rows and columns (Gupta et al. 2018), in blocks and grafted; see
    `research.optim.shampoo.scale_by_shampoo`."""
    made = scale_by_shampoo(
        b1=b1, b2=b2, eps=eps, every=every, start=start, block=block, graft=graft, graft_eps=graft_eps
    )  # fmt: skip
    return Core(made)


def psgd_kron(
    *,
    momentum: float = 0.9,
    rate: float = 0.1,
    initial: float = 1.0,
    largest: int = 8192,
    balance_every: int = 100,
    seed: int = 0,
) -> Core:
    """Kronecker factors fitted by whitening (Li 2018); see `research.optim.psgd_kron.scale_by_psgd_kron`."""
    made = scale_by_psgd_kron(
        momentum=momentum, rate=rate, initial=initial, largest=largest, balance_every=balance_every, seed=seed
    )  # fmt: skip
    return Core(made)


def schedule_free(*, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, power: float = 2.0) -> Core:
    """Adam without momentum, whose place an average of its iterates takes (Defazio et al. 2024, arXiv 2405.15682). It needs no
    schedule but a warmup.

    params are y, where gradients are taken; what `gradient` gives as variables, to evaluate and export, is the average x.
    power: of the schedule, by which iterates are weighted.
    """
    return Core(optax.scale_by_adam(0.0, b2, eps), (), schedule_free_of(b1, power))


def prodigy(
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    first: float = 1e-6,
    coefficient: float = 1.0,
    decay: float = 0.0,
    safeguard_warmup: bool = False,
) -> Core:
    """Adam that estimates its own step size d (Mishchenko and Defazio 2023, arXiv 2306.06101, algorithm 4); its learning rate
    is 1 unless there is a reason.

    first: of d. coefficient: of its estimate. decay: decoupled weight decay, times d and the learning rate, as published;
    `weight_decay` is times the learning rate alone, which is much. safeguard_warmup: leave the schedule out of the estimate.
    """
    around = prodigy_of(
        betas=(b1, b2), eps=eps, estim_lr0=first, estim_lr_coef=coefficient, weight_decay=decay,
        safeguard_warmup=safeguard_warmup
    )  # fmt: skip
    return Core(optax.identity(), (), around)


def learned(*, path: str, sha256: str = "") -> Core:
    """What the run in the folder `path` has learned (`research.optim.learned.restored`); with a learning rate of 1 its steps
    are as they were learned. sha256: that of its theta, where another is to be refused; "" for any. State: theta too."""
    found = restored(path)
    if sha256 not in ("", found.sha256):
        raise ValueError(f"optimizer.sha256={sha256!r}, but the theta in {path} has {found.sha256}; allowed: that one, or ''")
    return Core(optax.chain(carried(found.optimizer, found.theta), optax.scale(-1.0)))


OPTIMIZERS: Mapping[str, Callable[..., Core]] = {
    "sgd": sgd,
    "adamw": adamw,
    "rmsprop": rmsprop,
    "adagrad": adagrad,
    "lion": lion,
    "adafactor": adafactor,
    "muon": muon,
    "soap": soap,
    "shampoo": shampoo,
    "psgd_kron": psgd_kron,
    "schedule_free": schedule_free,
    "prodigy": prodigy,
    "learned": learned,
}


class Optimizer(NamedTuple):
    """An optimizer and what it was made of: its groups in order, and the values of what none of them takes."""

    transformation: optax.GradientTransformation
    groups: tuple[Group, ...]
    learning_rate: float
    weight_decay: float


def chained(
    core: Core,
    *,
    learning_rate: float,
    steps: int,
    weight_decay: float = 0.0,
    clip: float = 0.0,
    schedule: Mapping[str, Any] = CONSTANT,
    groups: grouping.Configs = NONE,
) -> Optimizer:
    """The optimizer around a core.

    learning_rate: peak. steps: of the run, for the schedule. weight_decay: decoupled, times the learning rate. clip:
    largest global norm of the gradient, 0 for none. schedule: see `research.optim.schedules`. groups: see
    `research.optim.groups.group`.
    """
    for name, value in {"learning_rate": learning_rate, "weight_decay": weight_decay, "clip": clip}.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"optimizer.{name}={value} is out of range: a finite number, 0 or above")
    given = grouping.groups(groups, "optimizer.groups")
    for g in given:
        if g.name in {c.name for c in core.groups}:
            raise ValueError(f"optimizer.groups.{g.name}: this optimizer has a group of that name; choose another")
    own = (*given, *core.groups)
    factor = schedules.schedule(schedule, peak=1.0, steps=steps, where="optimizer.schedule")
    links = [optax.clip_by_global_norm(clip)] if clip else []
    own_links = [core.transformation, scale_by_rates(learning_rate, weight_decay, factor, own)]
    links += own_links if core.around is None else [core.around(optax.chain(*own_links), factor)]
    return Optimizer(optax.chain(*links), own, learning_rate, weight_decay)


def optimizer(config: Mapping[str, Any], *, steps: int) -> Optimizer:
    """The optimizer of a config: `name`, the keywords of `chained`, and those of the core of that name. ValueError (one
    line) on an unknown name or keyword, with the nearest match, on a missing one, and on a value out of its range."""
    given = dict(config)
    for key in ("name", "learning_rate"):
        if key not in given:
            raise ValueError(f"optimizer lacks optimizer.{key}; given: {', '.join(given) or 'none'}")
    name = given.pop("name")
    kind = choose(OPTIMIZERS, name, "optimizer.name")
    common = [name for name in keywords(chained)[0] if name not in ("core", "steps")]
    allowed = [*common, *keywords(kind)[0]]
    for key in given:
        if key not in allowed:
            raise ValueError(f"optimizer.{key} is unknown; allowed: {', '.join(allowed)}{suggestion(key, allowed)}")
    own = {k: v for k, v in given.items() if k not in common}
    core = call_checked(kind, own, "optimizer")
    _check_ranges(name, own)
    around = {k: v for k, v in given.items() if k in common}
    return call_checked(chained, {"core": core, "steps": steps, **around}, "optimizer")


def make(config: Mapping[str, Any], *, steps: int) -> optax.GradientTransformation:
    """The optax transformation of a config; see `optimizer` and the module."""
    return optimizer(config, steps=steps).transformation


def describe(made: Optimizer, params: Tree) -> dict[str, dict[str, float]]:
    """{path: {"learning_rate", "weight_decay"}} of every parameter (or its shape): what a dry run shows."""
    own = own_values(made.learning_rate, made.weight_decay, made.groups)
    return {
        joined(path): {"learning_rate": own[v.learning_rate] * v.factor, "weight_decay": own[v.weight_decay]}
        for path, v in grouping.assign(params, made.groups).items()
    }
