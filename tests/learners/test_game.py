"""Players of a game move what they own, seeing what the others have."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest

from research.core import contracts
from research.core.types import Aux, Method, Spec, Task
from research.estimates import accumulated, exact, sharpness_aware
from research.learners import game
from research.learners.game import _shifting
from tests.learners.toys import KEY, close, same, started, stepped, trained

RATE = 0.25


def bilinear(sign, batch=None):
    """The loss sign * x * y: its gradient in either player's number is the other's."""

    def loss(variables, batch, key):
        x, y = variables["params"]["min"]["x"], variables["params"]["max"]["y"]
        return sign * x * y, Aux(variables["state"], {"product": (x * y, jnp.ones(()))}, None)

    def init(key):
        return {"params": {"min": {"x": jnp.full((), 2.0)}, "max": {"y": jnp.full((), 3.0)}}, "state": {}, "frozen": {}}

    return Task(init, loss, {}, {} if batch is None else batch)


def played(updates, order=("min", "max")):
    signs = {"min": 1.0, "max": -1.0}
    learner = game({name: (bilinear(signs[name]), optax.sgd(RATE), exact()) for name in order}, updates)
    state, metrics = stepped(learner, started(learner), {})
    return float(state["params"]["min"]["x"]), float(state["params"]["max"]["y"]), metrics


def test_simultaneous_players_see_each_other_as_they_were():
    x, y, metrics = played("simultaneous")
    assert (x, y) == (2 - RATE * 3, 3 + RATE * 2)
    assert metrics["min/loss"] == (6, 1) and metrics["max/loss"] == (-6, 1) and metrics["loss"] == (0, 1)
    assert metrics["min/grad_norm"] == (3, 1) and metrics["min/product"] == (6, 1)


def test_alternating_players_see_those_before_them_moved():
    assert played("alternating")[:2] == (2 - RATE * 3, 3 + RATE * (2 - RATE * 3))
    assert played("alternating", ("max", "min"))[:2] == (2 - RATE * (3 + RATE * 2), 3 + RATE * 2)


def test_simultaneous_does_not_depend_on_the_order():
    assert played("simultaneous")[:2] == played("simultaneous", ("max", "min"))[:2]


def shifting(estimates=(exact(), exact()), **kwargs):
    players = zip(_shifting().items(), estimates, strict=True)
    return game({name: (task, optax.adam(0.1), e) for (name, task), e in players}, **kwargs)


def noise_batch(i=0):
    data, noise = jax.random.normal(jax.random.key(i), (2, 8))
    return {"data": data * 0.1 + 3, "noise": noise}


def test_a_player_keeps_only_its_own_state():
    """The generator's loss returns a state too; of it nothing is the generator's."""
    state, _ = trained(shifting(), 3, noise_batch)
    real = 0.0
    for i in range(3):
        real = 0.9 * real + 0.1 * float(noise_batch(i)["data"].mean())
    close(state["state"], {"discriminator": {"real": real}})
    assert set(state["opt"]) == {"generator", "discriminator"} and set(state["opt"]["generator"][0].mu) == {"shift"}


def test_the_generator_moves_towards_the_data():
    learner = shifting(updates="alternating")
    state, _ = trained(learner, 30, noise_batch)
    assert state["params"]["generator"]["shift"] > 1.5  # from 1, the data being at 3


def test_each_player_has_its_own_estimate_and_nothing_is_closed_over():
    learner = shifting((accumulated(2), sharpness_aware(0.05, accumulated(4))))
    contracts.check_learner(learner)
    plain, _ = trained(shifting((exact(), sharpness_aware(0.05))), 2, noise_batch)
    split, _ = trained(learner, 2, noise_batch)
    close(plain["params"], split["params"], 1e-4, 1e-5)


def test_merge_rules_reach_the_player_that_owns_the_path():
    tasks = _shifting()
    rules = {"discriminator/real": "max"}
    learner = game({name: (task._replace(merge=rules), optax.sgd(0.1), accumulated(8)) for name, task in tasks.items()})
    batch = noise_batch()
    state, _ = stepped(learner, started(learner), batch)
    close(state["state"]["discriminator"]["real"], 0.1 * batch["data"].max())


def test_variables_are_everyones_and_can_be_given():
    learner = shifting()
    given = jax.tree.map(lambda x: x + 1, learner.variables(started(learner)))
    same(learner.variables(learner.init(KEY, given)), given)
    assert set(learner.methods) == {"generate"}
    assert learner.methods["generate"].apply(given, {"noise": jnp.zeros(8)}, KEY).tolist() == [2.0] * 8


SPEC = {"x": Spec((2,), jnp.float32, ("batch",))}
A, B = bilinear(1.0), bilinear(-1.0)


@pytest.mark.parametrize(
    "players, said",
    [
        ({}, "game: no players given"),
        ({"min": A, "maximum": B}, "game: params have the subtrees ['max', 'min']; allowed: one a player, ['maximum', 'min']"),
        ({"min": A}, "game: params have the subtrees ['max', 'min']; allowed: one a player, ['min']"),
        ({"min": A, "max": bilinear(-1.0, SPEC)}, "game: batch of 'max', beside that of 'min': x: expected no such leaf"),
        (
            {"min": A, "max": B._replace(init=lambda k: {**A.init(k), "frozen": {"z": jnp.ones(())}})},
            "game: init of 'max', beside that of 'min': frozen/z: expected no such leaf",
        ),
        (
            {
                "min": A._replace(methods={"predict": Method(lambda v, x, k: x, {})}),
                "max": B._replace(methods={"predict": Method(lambda v, x, k: v, {})}),
            },
            "game: 'max' defines the method 'predict' otherwise than another player",
        ),
    ],
)
def test_players_that_do_not_fit_are_refused_in_one_line(players, said):
    with pytest.raises(ValueError) as error:
        game({name: (task, optax.sgd(0.1), exact()) for name, task in players.items()})
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_state_that_no_player_owns_is_refused():
    def owned_by_none(task):
        return task._replace(
            init=lambda k: {**task.init(k), "state": {"shared": jnp.zeros(())}},
            loss=lambda v, b, k: task.loss(v, b, k),
        )

    with pytest.raises(ValueError, match=r"game: state has the subtrees \['shared'\]; allowed: one a player, \['max', 'min'\]"):
        game({"min": (owned_by_none(A), optax.sgd(0.1), exact()), "max": (owned_by_none(B), optax.sgd(0.1), exact())})


def test_an_unknown_kind_of_updates_is_refused():
    with pytest.raises(
        ValueError, match="game: updates='alternate' is unknown; allowed: alternating, simultaneous; nearest: 'alternating'"
    ):
        game({"min": (A, optax.sgd(0.1), exact()), "max": (B, optax.sgd(0.1), exact())}, "alternate")
