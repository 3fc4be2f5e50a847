"""A whole language model with its sequences cut over devices computes what it computes on one.

Attention goes in a ring; the compiler lays out what stands around it: positions, convolutions, n-grams, induction, the loss.
"""

import functools

import numpy as np
import pytest

from research.core.mesh import make_layout
from tests.models.test_on_a_mesh import language, steps

SCANNED = {"scan_layers": True, "remat": ["full"]}


@functools.cache
def alone(scanned):
    task, batch = language(**SCANNED if scanned else {})
    return task, batch, steps(task, batch, None)


@pytest.mark.parametrize("scanned, sizes", [(False, {"data": 2, "sequence": 2, "tensor": 2}), (True, {"sequence": 2})])
@pytest.mark.slow
def test_losses_are_those_of_one_device(scanned, sizes):
    task, batch, expected = alone(scanned)
    assert expected[0] != expected[2]
    np.testing.assert_allclose(steps(task, batch, make_layout(sizes)), expected, rtol=2e-6)


def test_a_length_that_does_not_divide_is_one_line():
    task, batch = language()
    with pytest.raises(ValueError, match=r"length.* of 136 is not divisible by mesh sequence=3"):
        steps(task, batch, make_layout({"sequence": 3}))
