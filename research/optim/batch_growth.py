"""Batches that grow as the gradient's noise does (McCandlish et al. 2018, arXiv 1812.06162, section 2.3 and figure 4).

A pilot run with small batches logs "noise_scale" (`research.estimates.noise_scale`); `batch_sizes` makes a plan of it, and
`growing` makes stages of a plan. Variables go from stage to stage; each stage's optimizer begins anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from research.core.types import Batches, Learner, Stage

Plan = list[tuple[int, int]]


def batch_sizes(
    measured: Sequence[tuple[int, float]], *, batch: int, steps: int, largest: int, examples_a_row: int = 1
) -> Plan:
    """[(batch, steps)] that sees as many rows as `steps` steps of a pilot run with batches of `batch` did.

    measured: [(step, noise scale)] of the pilot run, each the mean up to this step since the one before, in units of
    `Aux.weight`, of which a row of the batch has `examples_a_row` (tokens a sequence). Each part of the run takes the power of
    two times `batch` nearest to the noise scale measured in it, no smaller than the one before and `largest` at most; equal
    neighbors are one. What is not finite or not positive says nothing, and the batch stays.

    Raises ValueError where steps do not rise from above 0 to `steps`, `largest` is below `batch`, or a size is below 1.
    """
    for name, value in {"batch": batch, "examples_a_row": examples_a_row}.items():
        if value < 1:
            raise ValueError(f"batch_sizes: {name}={value}; allowed: 1 or more")
    ends = [step for step, _ in measured]
    if ends != sorted(set(ends)) or not ends or ends[0] < 1 or ends[-1] > steps:
        raise ValueError(f"batch_sizes: measured at steps {ends}; allowed: rising, from 1 to {steps}")
    if largest < batch:
        raise ValueError(f"batch_sizes: largest={largest}; allowed: batch={batch} or more")
    most = int(math.log2(largest / batch))
    plan: list[tuple[int, float]] = []
    begin, power = 0, 0
    for i, (step, noise) in enumerate(measured):
        end = steps if i == len(measured) - 1 else step
        if math.isfinite(noise) and noise > 0:
            power = max(power, min(most, round(math.log2(noise / examples_a_row / batch))))
        size, rows = batch * 2**power, (end - begin) * batch
        if plan and plan[-1][0] == size:
            plan[-1] = (size, plan[-1][1] + rows)
        else:
            plan.append((size, rows))
        begin = end
    return [(size, max(1, round(rows / size))) for size, rows in plan]


def growing(plan: Sequence[tuple[int, int]], make: Callable[[int, int], tuple[Learner, Batches]]) -> list[Stage]:
    """A Stage for each (batch, steps) of the plan: `make(batch, steps)` gives its learner and its source of batches, which
    should not begin with the same examples in each. Raises ValueError where the plan is empty, or batches shrink."""
    sizes = [batch for batch, _ in plan]
    if not sizes or sizes != sorted(sizes) or any(n < 1 for pair in plan for n in pair):
        raise ValueError(f"growing: plan {list(plan)}; allowed: (batch, steps) of 1 or more, batches that do not shrink")
    return [Stage(*make(batch, steps), steps) for batch, steps in plan]
