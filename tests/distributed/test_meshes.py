"""One config on any mesh: the same losses, and what each device holds and says."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from benchmarks.meshes import MESHES, alone, held, on
from research.core.collectives import collectives, totals

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("name", MESHES)
def test_losses_are_those_of_one_device(name):
    expected = alone(name).losses
    assert expected[-1] < 0.6 * expected[0]
    np.testing.assert_allclose(on(name).losses, expected, rtol=1e-5)


@pytest.mark.parametrize("group", ["params", "opt"])
def test_each_of_eight_devices_holds_an_eighth(group):
    own = held(on("fsdp 8").state, group)
    assert own.on_a_device <= 1.02 * own.whole / 8


def test_parameters_are_gathered_one_by_one():
    """No collective brings more than the largest parameter together at once."""
    run = on("fsdp 8")
    largest = max(x.size * x.dtype.itemsize for x in jax.tree.leaves(run.state["params"]))
    gathers = [c for c in collectives(run.text) if c.kind == "all-gather"]
    assert gathers and max(c.bytes for c in gathers) <= largest


def test_data_parallel_devices_sum_gradients_and_gather_no_parameter():
    found = collectives(on("data 8").text)
    parameters = held(on("data 8").state, "params").whole
    assert 0.98 * parameters < totals(found)["all-reduce"].bytes < 1.1 * parameters
    assert sum(c.bytes for c in found if c.kind == "all-gather") < 0.05 * parameters
