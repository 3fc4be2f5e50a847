"""Families of tasks (`core.types.TaskFamily`), and episodes drawn from them.

Each factory gives a family of one form: what a learned optimizer, an initialization or a context is learned over. `families`
has a small instance of each, which the tests hold to the contract.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from research.core.types import Array, Aux, Batch, Key, Spec, Task, TaskFamily, Tree, Variables
from research.data.fashion_mnist import fashion_mnist
from research.data.mnist1d import mnist1d
from research.models.mlp import mlp
from research.nn import checks
from research.tasks.classification import classification
from research.tasks.regression import regression

PARTS = ("train", "test")


def families() -> dict[str, TaskFamily]:
    """A small instance of every family that needs no files, by the name of its factory."""
    x = np.random.default_rng(0).integers(0, 255, (12, 6), np.uint8)
    return {
        "sinusoids": sinusoids(4, hidden=[5]),
        "linear_regressions": linear_regressions(4, features=3, noise=0.1),
        "polynomials": polynomials(4, degree=2, hidden=[5]),
        "quadratic_bowls": quadratic_bowls(3),
        "classifiers": classifiers(x, np.arange(12) % 3, batch=4, hidden=[5]),
        "mnist1d_mlps": mnist1d_mlps(4, hidden=[5]),
    }


def _regressions(batch: int, features: int, hidden: Sequence[int], activation: str, init: str) -> Task:
    model = mlp(
        shape=[features], outputs=1, hidden=hidden, activation=activation, residual=False, dropout=0.0, init=init,
        dtype="float32",
    )  # fmt: skip
    return regression(model, batch=batch, shape=[features], outputs=1)


def _example(x: Array, y: Array) -> Batch:
    return {"inputs": x, "targets": y, "mask": jnp.ones(x.shape[0])}


def _between(name: str, low: float, high: float) -> None:
    if not low < high:
        raise ValueError(f"{name}=({low}, {high}); allowed: a lower bound below an upper one")


def sinusoids(
    batch: int,
    hidden: Sequence[int] = (40, 40),
    *,
    activation: str = "relu",
    init: str = "he_normal",
    amplitude: tuple[float, float] = (0.1, 5.0),
    phase: tuple[float, float] = (0.0, math.pi),
    inputs: tuple[float, float] = (-5.0, 5.0),
) -> TaskFamily:
    """Regression of a sin(x - p), a, p and x uniform within the bounds (Finn et al. 2017, arXiv 1703.03400, section 5.1), by an
    MLP of `hidden` widths. parameters: {"amplitude", "phase"}, scalars. Batches are those of `tasks.regression`: inputs and
    targets float32 [batch, 1]. Raises ValueError for bounds out of order and sizes below 1."""
    for name, bounds in {"amplitude": amplitude, "phase": phase, "inputs": inputs}.items():
        _between(f"sinusoids: {name}", *bounds)
    task = _regressions(batch, 1, hidden, activation, init)

    def sample(key: Key) -> Tree:
        k_amplitude, k_phase = jax.random.split(key)
        return {
            "amplitude": jax.random.uniform(k_amplitude, minval=amplitude[0], maxval=amplitude[1]),
            "phase": jax.random.uniform(k_phase, minval=phase[0], maxval=phase[1]),
        }

    def draw(parameters: Tree, data: Tree, key: Key) -> Batch:
        x = jax.random.uniform(key, (batch, 1), minval=inputs[0], maxval=inputs[1])
        return _example(x, parameters["amplitude"] * jnp.sin(x - parameters["phase"]))

    return TaskFamily(sample, lambda parameters: task, draw)


def linear_regressions(batch: int, features: int, *, noise: float = 0.0) -> TaskFamily:
    """Regression of w.x + b + noise, all of them and x standard normal, w / sqrt(features), by a linear model. parameters:
    {"kernel": [features], "bias": scalar}. Raises ValueError for sizes below 1 and negative noise."""
    checks.positive("linear_regressions: features", features)
    checks.not_negative("linear_regressions: noise", noise)
    task = _regressions(batch, features, [], "relu", "zeros")

    def sample(key: Key) -> Tree:
        k_kernel, k_bias = jax.random.split(key)
        kernel = jax.random.normal(k_kernel, (features,)) * features**-0.5
        return {"kernel": kernel, "bias": jax.random.normal(k_bias, ())}

    def draw(parameters: Tree, data: Tree, key: Key) -> Batch:
        k_x, k_noise = jax.random.split(key)
        x = jax.random.normal(k_x, (batch, features))
        y = x @ parameters["kernel"] + parameters["bias"] + noise * jax.random.normal(k_noise, (batch,))
        return _example(x, y[:, None])

    return TaskFamily(sample, lambda parameters: task, draw)


def polynomials(
    batch: int, degree: int, hidden: Sequence[int] = (40, 40), *, activation: str = "tanh", init: str = "normal"
) -> TaskFamily:
    """Regression of sum_i c_i x^i up to `degree`, c standard normal, x uniform from -1 to 1, by an MLP. parameters:
    {"coefficients": [degree + 1]}. Raises ValueError for a negative degree and sizes below 1."""
    checks.not_negative("polynomials: degree", degree)
    task = _regressions(batch, 1, hidden, activation, init)

    def sample(key: Key) -> Tree:
        return {"coefficients": jax.random.normal(key, (degree + 1,))}

    def draw(parameters: Tree, data: Tree, key: Key) -> Batch:
        x = jax.random.uniform(key, (batch, 1), minval=-1.0, maxval=1.0)
        return _example(x, jnp.polyval(parameters["coefficients"][::-1], x))

    return TaskFamily(sample, lambda parameters: task, draw)


def quadratic_bowls(size: int, *, condition: float = 100.0, noise: float = 0.0) -> TaskFamily:
    """Minima to find: (x - m)' Q diag(e) Q' (x - m) / 2 + noise n.x, with Q a random rotation, e log-uniform from 1 / condition
    to 1, m and the starting x standard normal, n standard normal anew each batch. parameters: {"curvature": [size, size],
    "minimum": [size]}; batches: {"noise": [size]}; params: {"x": [size]}. The task is its parameters', unlike those of
    the other families, whose parameters say only how batches are drawn. Raises ValueError for a size below 1, a condition below
    1 and negative noise."""
    checks.positive("quadratic_bowls: size", size)
    checks.not_negative("quadratic_bowls: noise", noise)
    if condition < 1:
        raise ValueError(f"quadratic_bowls: condition={condition}; allowed: 1 or more")

    def sample(key: Key) -> Tree:
        k_rotation, k_curvature, k_minimum = jax.random.split(key, 3)
        rotation, _ = jnp.linalg.qr(jax.random.normal(k_rotation, (size, size)))
        curvature = condition ** -jax.random.uniform(k_curvature, (size,))
        return {"curvature": (rotation * curvature[None]) @ rotation.T, "minimum": jax.random.normal(k_minimum, (size,))}

    def task(parameters: Tree) -> Task:
        def init(key: Key) -> Variables:
            return {"params": {"x": jax.random.normal(key, (size,))}, "state": {}, "frozen": {}}

        def loss(variables: Variables, batch: Batch, key: Key) -> tuple[Array, Aux]:
            x = variables["params"]["x"]
            away = x - parameters["minimum"]
            value = away @ parameters["curvature"] @ away / 2
            return value + batch["noise"] @ x, Aux(variables["state"], {"height": (value, jnp.ones_like(value))}, None)

        return Task(init, loss, {}, {"noise": Spec((size,), jnp.float32)})

    def draw(parameters: Tree, data: Tree, key: Key) -> Batch:
        return {"noise": noise * jax.random.normal(key, (size,))}

    return TaskFamily(sample, task, draw)


def classifiers(
    x: np.ndarray,
    y: np.ndarray,
    batch: int,
    hidden: Sequence[int],
    *,
    activation: str = "relu",
    init: str = "he_normal",
    scale: float = 1 / 255,
) -> TaskFamily:
    """MLPs of `hidden` widths on rows of x [n, features], multiplied by `scale`, with classes y int [n]: one task, whose
    batches are drawn with replacement from family.data {"inputs", "targets"}, kept in the dtype of x. Several widths are
    several families: the shapes of one are all the same. Raises ValueError for x and y that do not match and
    sizes below 1."""
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise ValueError(f"classifiers: x {x.shape} and y {y.shape}; allowed: [n, features] and [n]")
    features, classes = x.shape[1], int(y.max()) + 1
    model = mlp(
        shape=[features], outputs=classes, hidden=hidden, activation=activation, residual=False, dropout=0.0, init=init,
        dtype="float32",
    )  # fmt: skip
    task = classification(model, batch=batch, shape=[features], label_smoothing=0.0)

    def draw(parameters: Tree, data: Tree, key: Key) -> Batch:
        rows = jax.random.randint(key, (batch,), 0, data["targets"].shape[0])
        return _example(data["inputs"][rows].astype(jnp.float32) * scale, data["targets"][rows])

    data = {"inputs": jnp.asarray(x), "targets": jnp.asarray(y, jnp.int32)}
    return TaskFamily(lambda key: {}, lambda parameters: task, draw, data)


def fashion_mnist_mlps(batch: int, hidden: Sequence[int] = (32,), *, part: str = "train", folder: str | None = None,
                       activation: str = "relu") -> TaskFamily:  # fmt: skip
    """`classifiers` on Fashion-MNIST at 8x8, the problem of Metz et al. 2019 (arXiv 1810.10180): each pixel the mean of 4x4 of
    the image with 2 rows of 0 around it, kept as uint8. Raises ValueError where the data is not there, or for a part that is
    neither "train" nor "test"."""
    images, labels = _part(fashion_mnist(folder), part, "fashion_mnist_mlps")
    return classifiers(shrunk(images), labels, batch, hidden, activation=activation)


def mnist1d_mlps(batch: int, hidden: Sequence[int] = (32,), *, part: str = "train", activation: str = "relu") -> TaskFamily:
    """`classifiers` on MNIST-1D (Greydanus and Kobak 2020, arXiv 2011.14439), 40 numbers an example. Raises ValueError for a
    part that is neither "train" nor "test"."""
    x, y = _part(mnist1d(), part, "mnist1d_mlps")
    return classifiers(x, y, batch, hidden, activation=activation, scale=1.0)


def _part(data: dict[str, tuple[np.ndarray, np.ndarray]], part: str, who: str) -> tuple[np.ndarray, np.ndarray]:
    if part not in PARTS:
        raise ValueError(f"{who}: part={part!r}; allowed: {', '.join(PARTS)}")
    return data[part]


def shrunk(images: np.ndarray) -> np.ndarray:
    """uint8 [n, 28, 28, 1] -> uint8 [n, 64], 8x8 means of 4x4 pixels of the image with 2 rows and columns of 0 around it."""
    padded = np.pad(images[..., 0], ((0, 0), (2, 2), (2, 2)))
    blocks = padded.reshape(-1, 8, 4, 8, 4)
    return np.rint(blocks.mean((2, 4), dtype=np.float32)).astype(np.uint8).reshape(-1, 64)


def episodes(family: TaskFamily, n: int | None, support: int, query: int) -> Callable[[Tree, Key], Batch]:
    """A function of (family.data, key) that gives {"support", "query"}: `support` and `query` examples of one task, drawn
    apart, for each of `n` tasks, every leaf with a first axis [n, ...]; of one task without that axis where n is None. What
    `transforms.drawn` takes, for `over_tasks(maml(task), n)` and its like. The family's own batches may be of another size: as
    many are drawn as are needed. Leaves without a "batch" axis are those of the first.

    The tasks are told apart by their batches alone, so the family's task must not depend on its parameters (as quadratic bowls
    do). Raises ValueError for counts below 1.
    """
    for name, count in {"n": 1 if n is None else n, "support": support, "query": query}.items():
        checks.positive(f"episodes: {name}", count)
    specs = family.task(family.sample(jax.random.key(0))).batch

    def rows(parameters: Tree, data: Tree, key: Key, count: int) -> Batch:
        sizes = [s.shape[s.axes.index("batch")] for s in jax.tree.leaves(specs) if "batch" in s.axes]
        draws = -(-count // sizes[0]) if sizes else 1
        many = [family.batch(parameters, data, jax.random.fold_in(key, i)) for i in range(draws)]

        def one(spec: Spec, *xs: Array) -> Array:
            if "batch" not in spec.axes:
                return xs[0]
            axis = spec.axes.index("batch")
            return jax.lax.slice_in_dim(jnp.concatenate(xs, axis), 0, count, axis=axis)

        return jax.tree.map(one, specs, *many)

    def episode(data: Tree, key: Key) -> Batch:
        k_task, k_support, k_query = jax.random.split(key, 3)
        parameters = family.sample(k_task)
        return {"support": rows(parameters, data, k_support, support), "query": rows(parameters, data, k_query, query)}

    if n is None:
        return episode
    return lambda data, key: jax.vmap(episode, (None, 0))(data, jax.random.split(key, n))
