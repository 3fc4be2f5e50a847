"""What transforms share: abstract variables and axes of a task, and checks of what they are given."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from research.core.axes import replicated
from research.core.contracts import abstract_variables
from research.core.tree import leaves_with_paths, nested
from research.core.types import Batch, Key, Spec, Task, Tree, Variables


def axes_of(task: Task) -> Tree:
    """`task.axes`, or axes that name nothing."""
    return replicated(abstract_variables(task)) if task.axes is None else task.axes


def inside(variables: Variables, frozen: Tree) -> Variables:
    """Variables of an inner task whose frozen is `frozen`."""
    return {**variables, "frozen": frozen}


def nested_axis(name: str | None) -> str | None:
    """The name of an axis within a batch of batches: "batch" becomes "inner_batch", that "inner_inner_batch", others stay."""
    return f"inner_{name}" if name is not None and name.removesuffix("batch") == "inner_" * name.count("inner_") else name


def led(spec: Spec, n: int) -> Spec:
    """The Spec of `n` of them, along a new first axis "batch"."""
    return Spec((n, *spec.shape), spec.dtype, ("batch", *(nested_axis(name) for name in spec.axes)))


def by_step(specs: Tree, steps: int) -> Tree:
    """Specs of one for each of `steps`, along a new first axis that is nobody's."""
    return jax.tree.map(lambda s: Spec((steps, *s.shape), s.dtype, (None, *map(nested_axis, s.axes))), specs)


def leading(batch: Batch, who: str) -> int:
    """The size of the first axis that all leaves share. Raises ValueError where there is none."""
    shapes = {x.shape[:1] for x in jax.tree.leaves(batch)}
    if len(shapes) != 1 or () in shapes:
        raise ValueError(f"{who}: the leaves of a batch must share their first axis, got {sorted(shapes)}")
    return shapes.pop()[0]


def keys(key: Key, n: int) -> Key:
    """`n` keys of which the i-th does not depend on n."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n))


def packed(opt: Tree) -> dict[str, Any]:
    """An optimizer's state, whose containers are its own, as {"opt": nested dicts}: what Variables may hold."""
    return {"opt": {}, **nested(leaves_with_paths({"opt": opt}))}


def unpacked(packed: Tree, like: Tree) -> Tree:
    """The optimizer's state again, by path, in the containers of `like`."""
    found = dict(leaves_with_paths({"opt": packed}))
    paths = [path for path, _ in leaves_with_paths({"opt": like})]
    return jax.tree.unflatten(jax.tree.structure(like), [found[path] for path in paths])
