"""The properties that every member has. Each function raises AssertionError where one does not hold.

Tolerances, argued here for all:
    PROGRAM  one program against another that computes the same (vmapped and not, whole and in parts). Sums in another order
             differ by a few units in the last place of float32 (6e-8) a term; examples have sums of some hundred terms and take
             few steps: 1e-5 of the largest entry.
    FD64     central differences of fourth order at h = 1e-3 in float64. Truncation is h^4/30 = 3e-14 of the fifth derivative,
             rounding 1e-16/h = 1e-13 of the loss; 1e-7 leaves room for large fifth derivatives.
    FD32     the same at h = 3e-2, where the model casts to float32. Truncation is 3e-8 of the fifth derivative, rounding about
             1e-6/h = 3e-5 of the loss, the gradient itself good to about 1e-5: 1e-3 of its length, and NOISE32 of the loss.
    SIGMAS   a mean over keys against another: 6 standard errors, which chance exceeds once in 5e8.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.core import contracts
from research.core.checkpoint import Checkpoints
from research.core.evaluate import names_of
from research.core.tree import joined, leaves_with_paths, map_with_path
from research.core.types import Estimate, Evaluator, Example, Learner, Spec, Task
from research.estimates import exact
from research.learners import gradient, population

KEY = jax.random.key(7)
PROGRAM, FD64, FD32, NOISE32, SIGMAS = 1e-5, 1e-7, 1e-3, 2e-4, 6
ONES = ("mask", "weight")


def drawn(specs: Any, key: jax.Array) -> Any:
    """Arrays for Specs: floats normal, integers and booleans 0 or 1, what is called "mask" or "weight" ones."""

    def one(path: tuple[str, ...], spec: Spec) -> jax.Array:
        if path and path[-1] in ONES:
            return jnp.ones(spec.shape, spec.dtype)
        own = jax.random.fold_in(key, sum(map(ord, joined(path))))
        if jnp.issubdtype(spec.dtype, jnp.floating):
            return jax.random.normal(own, spec.shape, spec.dtype)
        return jax.random.bernoulli(own, 0.5, spec.shape).astype(spec.dtype)

    return map_with_path(one, specs)


def batch_of(example: Example, specs: Any, i: int = 0) -> Any:
    key = jax.random.fold_in(KEY, 100 + i)
    return jax.tree.map(jnp.asarray, drawn(specs, key) if example.batch is None else example.batch(key))


def task_of(example: Example) -> Task | None:
    """The Task that a member is, or that an Estimate runs on."""
    if isinstance(example.member, Task):
        return example.member
    return example.task if isinstance(example.member, Estimate) else None


def learner_of(example: Example) -> Learner | None:
    """A Learner that takes a step with the member: by plain gradient descent, whose steps are as smooth as the gradient (Adam
    makes a sign of what is rounding)."""
    if isinstance(example.member, Learner):
        return example.member
    task = task_of(example)
    if task is None:
        return None
    estimate = example.member if isinstance(example.member, Estimate) else exact()
    return gradient(task, optax.sgd(1e-2, momentum=0.9), estimate)


def close(a: Any, b: Any, tolerance: float, what: str) -> None:
    """Leaf by leaf, to `tolerance` of the largest entry of the leaf, or of 1 where that is smaller."""
    assert jax.tree.structure(a) == jax.tree.structure(b), what
    for (path, x), (_, y) in zip(leaves_with_paths(a), leaves_with_paths(b), strict=True):
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        room = tolerance * max(1.0, np.abs(y[np.isfinite(y)]).max(initial=0))
        np.testing.assert_allclose(x, y, rtol=0, atol=room, err_msg=f"{what}: {joined(path)}")


def same_bits(a: Any, b: Any, what: str) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b), what
    for (path, x), (_, y) in zip(leaves_with_paths(a), leaves_with_paths(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), f"{what}: {joined(path)}"


def abstract(example: Example) -> None:
    """The member keeps its contract, by shapes alone."""
    member, task = example.member, task_of(example)
    if task is not None:
        contracts.check_task(task)
    if isinstance(member, Estimate):
        contracts.check_estimate(member, task)
    if isinstance(member, Evaluator):
        variables = jax.eval_shape(example.task.init, contracts.abstract_key())
        contracts.check_evaluator(member, variables, contracts.abstract_batch(example.task.batch))
        return
    contracts.check_learner(learner_of(example))
    if example.batch is not None:
        contracts.check_batch(example.batch(KEY), learner_of(example).batch, "example().batch")


class Run:
    """A learner, compiled once, and its batches."""

    def __init__(self, example: Example, learner: Learner):
        self.example, self.learner = example, learner
        self.init = jax.jit(self.learner.init)
        self.one = jax.jit(self.learner.step)
        self.batch = functools.cache(lambda i: batch_of(example, self.learner.batch, i))

    @functools.cached_property
    def many(self) -> Run:
        """Two members of it."""
        return Run(self.example, population(self.learner, 2, frozen="own"))

    def step(self, state: Any, i: int) -> tuple[Any, Any]:
        return self.one(state, self.batch(i), jax.random.fold_in(KEY, i))

    def steps(self, state: Any, start: int, stop: int) -> tuple[Any, Any]:
        metrics = {}
        for i in range(start, stop):
            state, metrics = self.step(state, i)
        return state, metrics


_RUNS: dict[int, Run] = {}


def run_of(example: Example) -> Run:
    """The Run of an example, one for all properties: most of their time is compiling."""
    name = id(example.member)  # a Run holds its example, so no id is used twice
    if name not in _RUNS:
        _RUNS[name] = Run(example, learner_of(example))
    return _RUNS[name]


def finite_and_deterministic(example: Example) -> None:
    """Two real steps: the same bits twice, nothing finite turns otherwise, "step" counts, "frozen" stays."""
    run = run_of(example)
    start = run.init(KEY)
    same_bits(start, run.init(KEY), "init")
    (first, metrics), (again, metrics_again) = run.step(start, 0), run.step(start, 0)
    same_bits((first, metrics), (again, metrics_again), "step")
    second, _ = run.step(first, 1)
    assert (int(first["step"]), int(second["step"])) == (1, 2)
    same_bits(second["frozen"], start["frozen"], "frozen")
    for (path, old), (_, new) in zip(leaves_with_paths(start), leaves_with_paths(second), strict=True):
        if jnp.issubdtype(new.dtype, jnp.inexact):
            assert bool((jnp.isfinite(new) | ~jnp.isfinite(old)).all()), f"{joined(path)} is not finite"
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(metrics)), metrics


def resumes_bit_for_bit(example: Example, directory: Path) -> None:
    """Saved after two steps and read back, two more are what they would have been."""
    run = run_of(example)
    half, _ = run.steps(run.init(KEY), 0, 2)
    straight, _ = run.steps(half, 2, 4)
    checkpoints = Checkpoints(directory)
    checkpoints.save(half)
    back = checkpoints.load(checkpoints.latest(), jax.eval_shape(run.learner.init, KEY))
    checkpoints.close()
    same_bits(back, half, "read back")
    same_bits(run.steps(back, 2, 4)[0], straight, "going on")


def population_equals_one_by_one(example: Example) -> None:
    """Two members together are each as alone, with the keys that the population gives them."""
    run = run_of(example)
    many = run.many
    state, metrics = many.steps(many.init(KEY), 0, 2)
    for m in range(2):
        alone, seen = run.init(jax.random.fold_in(KEY, m)), {}
        for i in range(2):
            alone, seen = run.one(alone, run.batch(i), jax.random.fold_in(jax.random.fold_in(KEY, i), m))
        member = {name: x if name == "step" else jax.tree.map(lambda x, m=m: x[m], x) for name, x in state.items()}
        close(member, alone, PROGRAM, f"member {m}")
        close({k: (s[m], w[m]) for k, (s, w) in metrics.items()}, dict(seen), PROGRAM, f"metrics of member {m}")


def methods_run(example: Example) -> None:
    """Every method on its declared inputs alone (no batch, no labels), and over two members at once."""
    run = run_of(example)
    many = run.many.learner
    variables = many.variables(run.many.init(KEY))
    for name, method in run.learner.methods.items():
        inputs = drawn(method.inputs, KEY)
        together = jax.jit(many.methods[name].apply)(variables, inputs, KEY)
        for m in range(2):
            own = jax.tree.map(lambda x, m=m: x[m], variables)
            alone = jax.jit(method.apply)(own, inputs, KEY)
            for path, x in leaves_with_paths(alone):
                assert not np.isnan(np.asarray(x, np.float64)).any(), f"{name}: {joined(path)} is NaN"
            close(jax.tree.map(lambda x, m=m: x[m], together), alone, PROGRAM, f"{name} of member {m}")


def shards_of(batch: Any, specs: Any, n: int) -> list[Any]:
    """The batch as n, by stride along each leaf's "batch" axis; leaves without one go whole to each."""

    def cut(spec: Spec, x: jax.Array, i: int) -> jax.Array:
        if "batch" not in spec.axes:
            return x
        axis = spec.axes.index("batch")
        return jnp.take(x, jnp.arange(i, x.shape[axis], n), axis=axis)

    return [jax.tree.map(lambda spec, x, i=i: cut(spec, x, i), specs, batch) for i in range(n)]


def loss_is_the_weighted_mean_of_shards(example: Example) -> None:
    """Where `Aux.weight` is given: a batch's loss, weight and metrics are those of its shards, by weight and by sum.

    Where the loss depends on its key (dropout, augmentation) shards draw otherwise than the whole, so that is shown of means
    over keys.
    """
    task = task_of(example)
    variables, batch = jax.jit(task.init)(KEY), batch_of(example, task.batch)
    sizes = {s.shape[s.axes.index("batch")] for s in jax.tree.leaves(task.batch) if "batch" in s.axes}
    if jax.eval_shape(task.loss, variables, batch, KEY)[1].weight is None or not sizes:
        return
    (rows,) = sizes
    parts = shards_of(batch, task.batch, 2 if rows % 2 == 0 else rows)

    def sums(batch: Any, key: jax.Array) -> dict[str, Any]:
        value, aux = task.loss(variables, batch, key)
        return {"loss": value * aux.weight, "weight": aux.weight, "metrics": dict(aux.metrics)}

    def over_keys(batch: Any, offset: int) -> Any:
        keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(offset + jnp.arange(256))
        return jax.tree.map(lambda x: np.asarray(x, np.float64), jax.jit(jax.vmap(lambda k: sums(batch, k)))(keys))

    whole = over_keys(batch, 0)
    each = [over_keys(part, 256 * (i + 1)) for i, part in enumerate(parts)]
    total = jax.tree.map(lambda *xs: sum(xs), *each)

    def compare(path: tuple[str, ...], a: np.ndarray, b: np.ndarray) -> None:
        # the standard error is 0 where no key matters, and then only rounding is allowed
        chance = SIGMAS * np.sqrt((a.var(0) + b.var(0)) / 256)
        room = chance + PROGRAM * np.maximum(1, np.abs(a.mean(0)))
        assert (np.abs(a.mean(0) - b.mean(0)) <= room).all(), f"{joined(path)}: whole {a.mean(0)}, shards {b.mean(0)}"

    map_with_path(compare, whole, total)


def _casts_down(jaxpr: Any) -> bool:
    """Whether anything in it is computed in less than float64."""
    for eqn in jaxpr.eqns:
        narrow = (jnp.issubdtype(v.aval.dtype, jnp.floating) and v.aval.dtype != jnp.float64 for v in eqn.outvars)
        if any(narrow):
            return True
        for param in eqn.params.values():
            for inner in param if isinstance(param, (tuple, list)) else (param,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns") and _casts_down(inner):
                    return True
    return False


def gradient_agrees_with_finite_differences(example: Example) -> None:
    """Along a random direction in all params, along the gradient, and along one in each of up to twelve leaves, in float64
    where the model lets it."""
    task = task_of(example)
    estimate = example.member if isinstance(example.member, Estimate) else exact()
    with jax.enable_x64(True):

        def wide(tree: Any) -> Any:
            return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

        variables, batch = wide(jax.jit(task.init)(KEY)), wide(batch_of(example, task.batch))

        def loss(params: Any) -> jax.Array:
            return task.loss({**variables, "params": params}, batch, KEY)[0]

        wide_loss = not _casts_down(jax.make_jaxpr(loss)(variables["params"]).jaxpr)
        memory = estimate.init(task, variables, KEY)
        value, _, grads, _ = jax.jit(lambda m, v, b: estimate.grads(m, task, v, b, KEY))(memory, variables, batch)
        params, structure = jax.tree.flatten(variables["params"])
        grads = [g.astype(jnp.float64) for g in jax.tree.leaves(grads)]

        h, relative = (1e-3, FD64) if wide_loss else (3e-2, FD32)
        noise = FD64 if wide_loss else NOISE32
        points, weights = np.array([-2, -1, 1, 2]) * h, np.array([1, -8, 8, -1]) / (12 * h)

        @jax.jit
        def slope(direction: list[jax.Array]) -> jax.Array:
            def at(t: jax.Array) -> jax.Array:
                moved = [p + (t * d).astype(p.dtype) for p, d in zip(params, direction)]
                return loss(jax.tree.unflatten(structure, moved))

            return (jax.lax.map(at, jnp.asarray(points)) * weights).sum()

        def unit(direction: list[jax.Array]) -> list[jax.Array]:
            length = jnp.sqrt(sum((d**2).sum() for d in direction))
            return [d / jnp.where(length > 0, length, 1) for d in direction]

        draws = [jax.random.normal(jax.random.fold_in(KEY, i), p.shape, jnp.float64) for i, p in enumerate(params)]
        chosen = np.unique(np.linspace(0, len(params) - 1, min(12, len(params))).round().astype(int))
        directions = {"a random direction": unit(draws), "the gradient": unit(grads)}
        for j in chosen:
            alone = [d if i == j else jnp.zeros_like(d) for i, d in enumerate(draws)]
            directions[joined(leaves_with_paths(variables["params"])[j][0])] = unit(alone)
        scale = float(jnp.sqrt(sum((g**2).sum() for g in grads)))
        for name, direction in directions.items():
            found, expected = float(slope(direction)), float(sum((g * d).sum() for g, d in zip(grads, direction)))
            room = relative * max(scale, abs(found)) + noise * abs(float(value))
            assert abs(found - expected) <= room, f"along {name}: differences {found}, gradient {expected}"


def evaluator_is_sound(example: Example) -> None:
    """Stats of two batches are the same bits twice, and the sum of those of each; values are named numbers on the host."""
    evaluator, task = example.member, example.task
    variables = jax.jit(task.init)(KEY)
    update = jax.jit(evaluator.update)
    start = jax.tree.map(jnp.asarray, evaluator.init())
    batches = [batch_of(example, task.batch, i) for i in range(2)]
    one, two = (update(start, variables, b, KEY) for b in batches)
    both = update(one, variables, batches[1], KEY)
    same_bits(both, update(one, variables, batches[1], KEY), "update")
    close(jax.tree.map(lambda a, b, s: a + b - s, one, two, start), both, PROGRAM, "stats of both batches")
    values = evaluator.finalize(jax.device_get(both))
    assert set(names_of(evaluator)) == set(values), "an evaluator names what it measures on empty stats too"
    for name, value in values.items():
        assert isinstance(name, str) and isinstance(value, (int, float, np.number, np.ndarray)), f"{name}: {type(value)}"
        assert np.issubdtype(np.asarray(value).dtype, np.number), f"{name}: {value}"


def masked_rows_count_nothing(example: Example) -> None:
    """What the mask leaves out of a batch may hold anything that is finite: values stay the same."""
    evaluator, task = example.member, example.task
    batch = batch_of(example, task.batch)
    if not isinstance(batch, dict) or "mask" not in batch:
        return
    axis = task.batch["mask"].axes.index("batch")
    rows = jnp.arange(batch["mask"].shape[axis])
    other = batch_of(example, task.batch, 1)

    def keep(x: jax.Array, axis: int) -> jax.Array:
        return (rows > 0).reshape([-1 if i == axis else 1 for i in range(x.ndim)])

    def mixed(spec: Spec, x: jax.Array, y: jax.Array) -> jax.Array:
        return x if "batch" not in spec.axes else jnp.where(keep(x, spec.axes.index("batch")), x, y)

    mask = jnp.where(keep(batch["mask"], axis), batch["mask"], 0)
    variables, update = jax.jit(task.init)(KEY), jax.jit(evaluator.update)
    start = jax.tree.map(jnp.asarray, evaluator.init())
    found = [
        evaluator.finalize(jax.device_get(update(start, variables, {**b, "mask": mask}, KEY)))
        for b in (batch, jax.tree.map(mixed, task.batch, batch, other))
    ]
    close({k: np.asarray(v) for k, v in found[0].items()}, {k: np.asarray(v) for k, v in found[1].items()}, PROGRAM, "values")
