"""One config on any mesh: the same losses, and what each device holds and says."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from research.core.collectives import collectives, totals
from tests.distributed.trained import MESHES, SCANNED, trained

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def held(state, group):
    """(bytes of a group of the State on one device, bytes of it all)."""
    leaves = jax.tree.leaves(state[group])
    share = [np.prod(x.sharding.shard_shape(x.shape), dtype=int) * x.dtype.itemsize for x in leaves]
    return sum(share), sum(x.size * x.dtype.itemsize for x in leaves)


@pytest.mark.parametrize("name", MESHES)
def test_losses_are_those_of_one_device(name):
    one = trained(None, extra=tuple(SCANNED.items()) if "pipeline" in name else ())
    losses = trained(name).losses
    assert one.losses[-1] < 0.6 * one.losses[0]
    np.testing.assert_allclose(losses, one.losses, rtol=1e-5)


@pytest.mark.parametrize("group", ["params", "opt"])
def test_each_of_eight_devices_holds_an_eighth(group):
    own, whole = held(trained("fsdp 8").state, group)
    assert own <= 1.02 * whole / 8


def test_parameters_are_gathered_one_by_one():
    """No collective brings more than the largest parameter together at once."""
    run = trained("fsdp 8")
    largest = max(x.size * x.dtype.itemsize for x in jax.tree.leaves(run.state["params"]))
    gathers = [c for c in collectives(run.text) if c.kind == "all-gather"]
    assert gathers and max(c.bytes for c in gathers) <= largest


def test_data_parallel_devices_sum_gradients_and_gather_no_parameter():
    found = collectives(trained("data 8").text)
    _, parameters = held(trained("data 8").state, "params")
    assert 0.98 * parameters < totals(found)["all-reduce"].bytes < 1.1 * parameters
    assert sum(c.bytes for c in found if c.kind == "all-gather") < 0.05 * parameters
