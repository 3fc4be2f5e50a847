"""Learning features that a head adapts on."""

from __future__ import annotations

import optax

from research.core.types import Example, Task
from research.transforms._adapting import Adapting, by_gradient, check_optimizer, check_steps, chosen, episodic
from research.transforms._example import small_classifier


def anil(
    task: Task,
    inner_tx: optax.GradientTransformation = optax.sgd(0.01),
    steps: int = 1,
    *,
    adapts: str = "^head/",
    order: str = "second",
    truncation: int | None = None,
    support: int | None = None,
) -> Task:
    """`maml` in which only the leaves of params adapt in whose path, joined by slashes, the regular expression `adapts` is
    found: by default the head, as in Raghu et al. 2020 (arXiv 1909.09157, section 4). The others are learned, and the same for
    every support. All else, and what is raised, as in `maml`; ValueError too for a pattern that is no regular expression or
    is in no path."""
    check_optimizer("anil", inner_tx)
    through = check_steps("anil", steps, order, truncation)
    start, whole = chosen(task, adapts, "anil")
    adapting = Adapting(start, whole, lambda params: inner_tx)
    return episodic(task, by_gradient(task, adapting, steps, through), support, who="anil")


def example() -> Example:
    return Example(anil(small_classifier(batch=4), optax.sgd(0.1), steps=2))
