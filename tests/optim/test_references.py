"""Optimizers step by step beside other people's (tests/optim/references.py made the trajectories), and what they are in NumPy.

Tolerances: of the largest entry of the parameter. SOAP's QR is in float32 there, Shampoo is in float64 throughout, Kron is in
float32 throughout; over 12 steps a few hundred roundings add up.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.optim.psgd_kron import scale_by_psgd_kron
from research.optim.shampoo import scale_by_shampoo
from research.optim.soap import scale_by_soap
from tests.optim import references
from tests.optim.references import CASES, FILE, FIT_PROBABILITY, RATE, SOAP, STEPS, draws

SCALABLE = {"b1": 0.8, "b2": 0.95, "block": 4, "eps": 1e-13, "graft_eps": 1e-10}
WIDE = {
    "shampoo": lambda: scale_by_shampoo(b1=0.0, b2=1.0, eps=1e-13, every=1, graft="none"),
    "shampoo_blocks": lambda: scale_by_shampoo(every=1, graft="rmsprop", **SCALABLE),
    "shampoo_adagrad": lambda: scale_by_shampoo(every=1, graft="adagrad", **SCALABLE),
    "shampoo_stale": lambda: scale_by_shampoo(every=3, graft="rmsprop", **SCALABLE),
    "soap": lambda: scale_by_soap(**SOAP),
}


def trajectory(case, tx, dtype, first=lambda state: state):
    """{name: [STEPS + 1, *shape]} of ours; `first` changes the State after the first step."""
    update = jax.jit(tx.update)
    held = {}

    def move(gradients, t):
        if t == 0:
            held["params"] = {name: references.start(name).astype(dtype) for name in gradients}
            held["state"] = tx.init(held["params"])
        grads = {name: jnp.asarray(g, dtype) for name, g in gradients.items()}
        updates, state = update(grads, held["state"], held["params"])
        held["state"] = first(state) if t == 0 else state
        held["params"] = jax.tree.map(lambda p, u: p - RATE * u, held["params"], updates)
        return held["params"]

    return references.run(CASES[case], move)


def compare(case, found, tolerance):
    theirs = np.load(FILE)
    for name in CASES[case]:
        expected = theirs[f"{case}/{name}"]
        moved = np.abs(expected[-1] - expected[0]).max()
        assert moved > 0.1, f"{name} hardly moved, which shows nothing"
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=tolerance * np.abs(expected).max(), err_msg=name)


def with_their_first_basis(state):
    """SOAP's first basis of a statistic of less than full rank is anyone's choice: theirs."""
    theirs = np.load(FILE)
    for i, side in enumerate(("left", "right")):
        state[side]["basis"]["tall"] = jnp.asarray(theirs[f"soap_basis/tall/{i}"])
    return state


@pytest.mark.parametrize("case", sorted(WIDE))
def test_twelve_steps_are_those_of_pytorch_optimizer_in_float64(case):
    with jax.enable_x64(True):
        first = with_their_first_basis if case == "soap" else lambda state: state
        found = trajectory(case, WIDE[case](), np.float64, first)
    compare(case, found, 2e-6 if case == "soap" else 1e-8)


def test_twelve_steps_of_psgd_on_the_same_draws_are_those_of_pytorch_optimizer_in_float32():
    table = [jnp.asarray(draws(name, i)) for i, name in enumerate(CASES["psgd_kron"])]
    tx = scale_by_psgd_kron(
        largest=8,
        probability=lambda count: jnp.float32(FIT_PROBABILITY),
        draw=lambda seed, count, leaf, like: table[leaf][count],
    )
    compare("psgd_kron", trajectory("psgd_kron", tx, np.float32), 1e-5)


def test_the_references_are_of_this_problem():
    theirs = np.load(FILE)
    assert {name.split("/")[0] for name in theirs} == {*CASES, "soap_basis"}
    for case, names in CASES.items():
        for name in names:
            x = theirs[f"{case}/{name}"]
            assert len(x) == STEPS + 1
            np.testing.assert_allclose(x[0], references.start(name), rtol=1e-6)
