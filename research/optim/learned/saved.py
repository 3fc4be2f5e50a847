"""Learned optimizers by name, and theta from the run that learned it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from research.core.contracts import ContractError, abstract_key, check_same
from research.core.names import call_checked, choose
from research.core.storage import state_sha256
from research.core.types import LearnedOptimizer, Tree
from research.core.workdir import config_of, load_run
from research.optim.learned.mlp import per_parameter_mlp
from research.optim.learned.preconditioner import neural_preconditioner
from research.optim.learned.rnn import coordinatewise_rnn
from research.optim.learned.scales import learned_scales

SECTION = "learned_optimizer"  # of the config of a run that learns one


class Kind(NamedTuple):
    """How one is made, and the version of what its theta means: features, their order, scales. A change of these is another
    version, whose number a config must give, so that no theta is read as what it is not."""

    make: Callable[..., LearnedOptimizer]
    version: int


LEARNED: Mapping[str, Kind] = {
    "per_parameter_mlp": Kind(per_parameter_mlp, 1),
    "coordinatewise_rnn": Kind(coordinatewise_rnn, 1),
    "learned_scales": Kind(learned_scales, 1),
    "neural_preconditioner": Kind(neural_preconditioner, 1),
}


def learned_optimizer(config: Mapping[str, Any], where: str = SECTION) -> LearnedOptimizer:
    """The LearnedOptimizer of `{"name": …, "version": …, its keywords}`. ValueError (one line) on an unknown name or keyword,
    and on another version than today's."""
    given = dict(config)
    for key in ("name", "version"):
        if key not in given:
            raise ValueError(f"{where} lacks {where}.{key}; given: {', '.join(config) or 'none'}")
    name, version = given.pop("name"), given.pop("version")
    kind = choose(LEARNED, name, f"{where}.name")
    if version != kind.version:
        raise ValueError(f"{where}.version={version!r} of {name} is not what this code computes; allowed: {kind.version}")
    return call_checked(kind.make, given, where)


class Restored(NamedTuple):
    """A learned optimizer, its theta, and theta's sha256."""

    optimizer: LearnedOptimizer
    theta: Tree
    sha256: str


def restored(path: str | Path) -> Restored:
    """What the run in this folder has learned, by its newest intact checkpoint.

    ValueError (one line) where there is no run, the run learned no optimizer, it has no checkpoint yet, or its theta is not
    that of the optimizer in its config (a population's, or another kind's).
    """
    config = config_of(path)
    if SECTION not in config:
        raise ValueError(f"{path} is a run that learned no optimizer: its config has no {SECTION}; allowed: one that did")
    made = learned_optimizer(config[SECTION], f"{path}: {SECTION}")
    variables = load_run(path).variables
    if variables is None:
        raise ValueError(f"{path} has no theta yet: no checkpoint is there; allowed: a run that has saved one")
    theta = variables["params"]
    try:
        check_same(jax.eval_shape(made.init, abstract_key()), theta, f"{path}: theta")
    except ContractError as error:
        raise ValueError(f"{error}; allowed: the theta of {config[SECTION]['name']}, as the run's config has it") from None
    return Restored(made, theta, state_sha256(theta))


class Carried(NamedTuple):
    """theta, and the state of what it makes."""

    theta: Tree
    state: Tree


def carried(made: LearnedOptimizer, theta: Tree) -> optax.GradientTransformation:
    """The transformation of theta, with theta in its state: a checkpoint of what it trains goes on with the same theta, though
    the run that learned it has gone on too."""

    def init(params: Tree) -> Carried:
        return Carried(theta, made.transformation(theta).init(params))

    def update(updates: Tree, state: Carried, params: Tree | None = None, **extra: Any) -> tuple[Tree, Carried]:
        tx = optax.with_extra_args_support(made.transformation(state.theta))
        updates, inner = tx.update(updates, state.state, params, **extra)
        return updates, Carried(state.theta, inner)

    return optax.GradientTransformationExtraArgs(init, update)
