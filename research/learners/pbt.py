"""Population based training: members that do badly become copies of ones that do well, with other hyperparameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from research.core.axes import POPULATION
from research.core.contracts import abstract_batch, abstract_key
from research.core.tree import Path, joined, leaves_with_paths, map_with_path
from research.core.types import Array, Batch, Example, Key, Learner, Metrics, State, Task, Tree, Variables
from research.estimates._example import linear_regression
from research.learners.gradient import gradient
from research.learners.population import hyperparameter, lanes, over_mesh, population

Score = Callable[[Variables, Batch, Key], Array]
KEPT = ("step", "frozen")  # what no member takes over from another


def loss_as_score(task: Task) -> Score:
    """The score that is the task's own loss."""
    return lambda variables, batch, key: task.loss(variables, batch, key)[0]


def pbt(
    population: Learner,
    score: Score,
    hyper: Mapping[str, Sequence[float]],
    every: int,
    *,
    fraction: float = 0.2,
    factors: Sequence[float] = (0.8, 1.2),
    resample: float = 0.0,
    validation: Tree = None,
    frozen: str = "shared",
) -> Learner:
    """Population based training (Jaderberg et al. 2017, arXiv 1711.09846, section 3 and algorithm 1) of a `population`.

    After every `every` steps each member is scored on the batch's "validation". Exploit, by truncation selection (section
    4.1.1): a member in the last `fraction` of the ranks (at least one), or whose score is not finite, takes over all of the
    State of one drawn from the first `fraction`, the hyperparameters too. Explore: each of its hyperparameters is multiplied by
    one of `factors`, each as likely, or, with probability `resample`, drawn anew, and kept within its bounds. Where no score is
    finite nobody moves. All of it is part of the compiled step; members may lie on different devices.

    population: a `population`, or what wraps one. Over `population(skip_nonfinite(learner), n)` one member's NaN stops that
        member alone, until it is replaced.
    score: (one member's variables, the batch's "validation", key) -> scalar, the smaller the better; `loss_as_score` of a task
        is one. All members get the same key.
    hyper: {name: (lowest, highest)} of floats among the State's leaves, called as in `vary` of `population`; values to begin
        with are those that it has.
    validation: Specs of batch["validation"]; those of the population's own batch where None.
    frozen: "shared" or "own", as in the population; each keeps its own.

    State: the population's. batch: {"train", "validation"}. Metrics: the population's; "hyper/<name>" [n] after the step; of
    the steps that exploit (weight 0 in others) "pbt/score" [n] of the scores that are finite, "pbt/rank" [n] from 0, the best,
    "pbt/replaced" [n] 0 or 1, and "pbt/source" [n], the member whose State it has now.

    Raises ValueError (one line): a learner that is no population, fewer than 2 members, every below 1, a fraction outside (0,
    1/2], factors or bounds that are none, a hyperparameter that is not there, no float, or shared, a score that is no scalar.
    """
    n, path_of = _checked(population, hyper, every, fraction, factors, resample)
    last = max(1, int(n * fraction))
    members = jax.tree.map(lambda axes: bool(axes) and axes[0] == POPULATION, _moving(population.axes))
    lane = lanes(frozen)

    def scored(state: State, batch: Batch, key: Key) -> Array:
        one = jax.vmap(score, (lane, None, None), spmd_axis_name=over_mesh())
        return one(population.variables(state), batch, key).astype(jnp.float32)

    _check_score(score, population, validation, lane)

    def exploited(state: State, source: Array) -> State:
        taken = jax.tree.map(lambda own, x: x[source] if own else x, members, _moving(state))
        return {**state, **taken}

    def explored(state: State, replaced: Array, key: Key) -> State:
        def one(path: Path, x: Array) -> Array:
            if path not in path_of:
                return x
            name = path_of[path]
            low, high = hyper[name]
            k_factor, k_which, k_new = jax.random.split(jax.random.fold_in(key, list(path_of).index(path)), 3)
            new = x * jax.random.choice(k_factor, jnp.asarray(factors, x.dtype), x.shape)
            if resample:
                u = jax.random.uniform(k_new, x.shape, x.dtype)
                drawn = jnp.exp(jnp.log(low) + u * (jnp.log(high) - jnp.log(low))).astype(x.dtype)
                new = jnp.where(jax.random.bernoulli(k_which, resample, x.shape), drawn, new)
            return jnp.where(_column(replaced, x.ndim), jnp.clip(new, low, high), x)

        return map_with_path(one, state)

    def exploit_and_explore(state: State, batch: Batch, key: Key) -> tuple[State, Metrics]:
        k_score, k_source, k_explore = jax.random.split(key, 3)
        scores = scored(state, batch, k_score)
        finite = jnp.isfinite(scores)
        order = jnp.argsort(jnp.where(finite, scores, jnp.inf))
        rank = jnp.argsort(order)
        best = jnp.minimum(last, finite.sum())
        replaced = ((rank >= n - last) | ~finite) & (best > 0)
        drawn = order[jnp.floor(jax.random.uniform(k_source, (n,)) * best).astype(jnp.int32)]
        source = jnp.where(replaced, drawn, jnp.arange(n))
        state = explored(exploited(state, source), replaced, k_explore)
        seen = {"score": jnp.where(finite, scores, 0), "rank": rank, "replaced": replaced, "source": source}
        ones = jnp.ones(n, jnp.float32)
        counts = {**dict.fromkeys(seen, ones), "score": finite.astype(jnp.float32)}
        return state, {f"pbt/{name}": (x.astype(jnp.float32), counts[name]) for name, x in seen.items()}

    def wait(state: State, batch: Batch, key: Key) -> tuple[State, Metrics]:
        zeros = jnp.zeros(n, jnp.float32)
        return state, {f"pbt/{name}": (zeros, zeros) for name in ("score", "rank", "replaced", "source")}

    def step(state: State, batch: Batch, key: Key) -> tuple[State, Metrics]:
        k_step, k_pbt = jax.random.split(key)
        state, metrics = population.step(state, batch["train"], k_step)
        due = state["step"] % every == 0
        state, seen = jax.lax.cond(due, exploit_and_explore, wait, state, batch["validation"], k_pbt)
        leaves = {path: x for path, x in leaves_with_paths(state) if path in path_of}
        now = {f"hyper/{name}": (leaves[path], jnp.ones_like(leaves[path])) for path, name in path_of.items()}
        return state, {**metrics, **now, **seen}

    specs = {"train": population.batch, "validation": population.batch if validation is None else validation}
    return population._replace(step=step, batch=specs)


def _moving(tree: Tree) -> Tree:
    return {name: x for name, x in tree.items() if name not in KEPT}


def _column(x: Array, ndim: int) -> Array:
    return x.reshape(x.shape + (1,) * (ndim - 1))


def _checked(
    learner: Learner,
    hyper: Mapping[str, Sequence[float]],
    every: int,
    fraction: float,
    factors: Sequence[float],
    resample: float,
) -> tuple[int, dict[Path, str]]:
    """(how many members, {path in State: name of the hyperparameter})."""
    axes = leaves_with_paths(_moving(learner.axes))
    if not any(names and names[0] == POPULATION for _, names in axes):
        raise ValueError('pbt: needs a population, got a learner whose State has no axis "population"')
    if every < 1:
        raise ValueError(f"pbt: every={every}; allowed: 1 or more")
    if not 0 < fraction <= 0.5:
        raise ValueError(f"pbt: fraction={fraction}; allowed: above 0, at most 0.5")
    if not factors or not all(f > 0 for f in factors):
        raise ValueError(f"pbt: factors={tuple(factors)}; allowed: one number or more, each above 0")
    if not 0 <= resample <= 1:
        raise ValueError(f"pbt: resample={resample}; allowed: from 0 to 1")
    if not hyper:
        raise ValueError('pbt: hyper={}; allowed: {name: (lowest, highest)}, such as {"learning_rate": (1e-4, 1e-1)}')
    state = jax.eval_shape(learner.init, abstract_key())
    shapes, named = dict(leaves_with_paths(state)), dict(axes)
    n = next(shapes[path].shape[0] for path, names in axes if names and names[0] == POPULATION)
    if n < 2:
        raise ValueError(f"pbt: a population of {n}; allowed: 2 members or more")
    paths: dict[Path, str] = {}
    for name, bounds in hyper.items():
        path = hyperparameter(state, name, "hyper")
        if not named.get(path) or named[path][0] != POPULATION:
            raise ValueError(f"hyper[{name!r}]: {joined(path)} is shared by all members and cannot vary")
        if not jnp.issubdtype(shapes[path].dtype, jnp.floating):
            raise ValueError(f"hyper[{name!r}]: {joined(path)} is {shapes[path].dtype}; allowed: a float")
        if len(bounds) != 2 or not 0 <= bounds[0] < bounds[1]:
            raise ValueError(f"hyper[{name!r}]={tuple(bounds)}; allowed: (lowest, highest), 0 or above and not equal")
        if resample and not (bounds[0] > 0 and jnp.isfinite(bounds[1])):
            raise ValueError(
                f"hyper[{name!r}]={tuple(bounds)}: resample={resample} draws between them; allowed: above 0, finite"
            )
        paths[path] = name
    return n, paths


def _check_score(score: Score, learner: Learner, validation: Tree, lane: Mapping[str, int | None]) -> None:
    variables = jax.eval_shape(lambda key: learner.variables(learner.init(key)), abstract_key())
    batch = abstract_batch(learner.batch if validation is None else validation)
    scores = jax.eval_shape(jax.vmap(score, (lane, None, None)), variables, batch, abstract_key())
    if getattr(scores, "ndim", None) != 1:
        raise ValueError(f"pbt: score gives {scores} over the members; allowed: one number a member")


def example() -> Example:
    task = linear_regression()
    learner = gradient(task, optax.inject_hyperparams(optax.sgd)(learning_rate=0.1))
    many = population(learner, 3, {"learning_rate": (0.01, 0.1, 0.2)})
    return Example(pbt(many, loss_as_score(task), {"learning_rate": (1e-3, 1.0)}, every=2))
