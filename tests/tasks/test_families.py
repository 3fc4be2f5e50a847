"""Families of tasks against their contract and their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.contracts import ContractError, check_family, check_task
from research.core.types import Spec
from research.tasks import families as families_of_tasks
from research.tasks.families import (
    classifiers,
    episodes,
    families,
    fashion_mnist_mlps,
    linear_regressions,
    mnist1d_mlps,
    polynomials,
    quadratic_bowls,
    shrunk,
    sinusoids,
)
from research.transforms import drawn

KEY = jax.random.key(0)
SMALL = families()
NAMES = list(SMALL)


@pytest.mark.parametrize("name", NAMES)
def test_a_family_keeps_its_contract_with_traced_parameters(name):
    check_family(SMALL[name])


@pytest.mark.parametrize("name", NAMES)
def test_the_same_key_is_the_same_task_and_another_key_another_batch(name):
    family = SMALL[name]
    one, same, other = (family.sample(jax.random.key(i)) for i in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert not jax.tree.leaves(one) or any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))
    batches = [family.batch(one, family.data, jax.random.key(i)) for i in (3, 3, 4)]
    jax.tree.map(np.testing.assert_array_equal, *batches[:2])
    if name != "quadratic_bowls":  # whose batches are noise, here of size 0
        assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, batches[1:]), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_equal_over_parameters(name):
    """The task of any parameters has the Specs, axes and Variables of any other."""
    family = SMALL[name]
    one, other = (family.task(family.sample(jax.random.key(i))) for i in (1, 2))
    assert (one.batch, one.axes, one.merge) == (other.batch, other.axes, other.merge)
    shapes = [jax.eval_shape(task.init, KEY) for task in (one, other)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", ["quadratic_bowls", "sinusoids"])
def test_losses_map_over_parameters(name):
    family = SMALL[name]

    def loss(key):
        parameters = family.sample(key)
        task = family.task(parameters)
        return task.loss(task.init(KEY), family.batch(parameters, family.data, KEY), KEY)[0]

    many = jax.jit(jax.vmap(loss))(jax.random.split(KEY, 3))
    np.testing.assert_allclose(many[1], jax.jit(loss)(jax.random.split(KEY, 3)[1]), rtol=1e-5)


def test_a_family_that_breaks_its_contract_is_told():
    family = SMALL["sinusoids"]
    with pytest.raises(ContractError, match=r"family.batch: inputs: expected float32\[4,1\], got float32\[4\]"):
        check_family(family._replace(batch=lambda p, d, k: {**family.batch(p, d, k), "inputs": jnp.zeros(4)}))
    with pytest.raises(ContractError, match="family.sample: key: expected an array"):
        check_family(family._replace(sample=lambda key: {"key": key}))
    with pytest.raises(ContractError, match="family: expected a TaskFamily, got int 3"):
        check_family(3)


def test_sinusoids_are_the_published_ones():
    family = sinusoids(500, hidden=[2])
    draws = jax.vmap(family.sample)(jax.random.split(KEY, 2000))
    for name, (low, high) in {"amplitude": (0.1, 5.0), "phase": (0.0, np.pi)}.items():
        assert low <= draws[name].min() < low + 0.05 and high - 0.05 < draws[name].max() <= high
    parameters = {"amplitude": jnp.float32(2.0), "phase": jnp.float32(0.5)}
    batch = family.batch(parameters, {}, KEY)
    np.testing.assert_allclose(batch["targets"], 2 * np.sin(np.asarray(batch["inputs"]) - 0.5), atol=1e-6)
    assert -5 <= batch["inputs"].min() < -4.9 and 4.9 < batch["inputs"].max() <= 5 and batch["mask"].sum() == 500


def test_regressions_are_solved_by_their_parameters():
    family = linear_regressions(6, features=3)
    parameters = family.sample(KEY)
    task, batch = family.task(parameters), family.batch(parameters, {}, KEY)
    head = {"kernel": parameters["kernel"][:, None], "bias": parameters["bias"][None]}
    assert task.loss({"params": {"head": head}, "state": {}, "frozen": {}}, batch, KEY)[0] < 1e-10
    cubic = polynomials(6, degree=3)
    c = cubic.sample(KEY)["coefficients"]
    batch = cubic.batch({"coefficients": c}, {}, KEY)
    x = np.asarray(batch["inputs"], np.float64)
    np.testing.assert_allclose(batch["targets"], sum(float(c[i]) * x**i for i in range(4)), atol=1e-5)


def test_a_quadratic_bowl_is_lowest_at_its_minimum_and_as_curved_as_it_says():
    family = quadratic_bowls(5, condition=50.0, noise=0.5)
    parameters = family.sample(KEY)
    eigenvalues = np.linalg.eigvalsh(parameters["curvature"])
    assert eigenvalues.min() > 0.019 and eigenvalues.max() < 1.001
    task = family.task(parameters)
    value, aux = task.loss({"params": {"x": parameters["minimum"]}, "state": {}, "frozen": {}}, {"noise": jnp.zeros(5)}, KEY)
    assert value == 0 and aux.metrics["height"] == (0, 1)
    noise = jax.vmap(lambda k: family.batch(parameters, {}, k)["noise"])(jax.random.split(KEY, 1000))
    np.testing.assert_allclose(noise.std(), 0.5, rtol=0.05)


def test_classifiers_draw_rows_of_their_data_scaled():
    x = np.arange(30, dtype=np.uint8).reshape(10, 3)
    family = classifiers(x, np.arange(10) % 4, batch=64, hidden=[4])
    assert family.data["inputs"].dtype == jnp.uint8
    batch = jax.jit(family.batch)({}, family.data, KEY)
    rows = np.rint(np.asarray(batch["inputs"])[:, 0] * 255 / 3).astype(int)
    np.testing.assert_allclose(batch["inputs"], x[rows] / 255, rtol=1e-6)
    np.testing.assert_array_equal(batch["targets"], rows % 4)
    assert set(rows) == set(range(10))
    logits = family.task({}).methods["predict"].apply(family.task({}).init(KEY), {"inputs": jnp.zeros((2, 3))}, KEY)
    assert logits.shape == (2, 4)


def test_images_are_shrunk_to_means_of_blocks():
    images = np.random.default_rng(0).integers(0, 255, (2, 28, 28, 1), np.uint8)
    small = shrunk(images)
    assert small.shape == (2, 64) and small.dtype == np.uint8
    assert small[1, 9] == np.rint(images[1, 2:6, 2:6, 0].mean())  # row 1, column 1: no edge in it
    assert small[1, 0] == np.rint(images[1, :2, :2, 0].sum() / 16)  # a corner: 12 of its 16 pixels are 0


def test_parts_and_widths_are_families_of_their_own():
    train, test = mnist1d_mlps(4, hidden=[7]), mnist1d_mlps(4, hidden=[7], part="test")
    assert train.data["inputs"].shape == (4000, 40) and test.data["inputs"].shape == (1000, 40)
    assert train.task({}).init(KEY)["params"]["layers"]["0"]["kernel"].shape == (40, 7)
    with pytest.raises(ValueError, match="mnist1d_mlps: part='vali'; allowed: train, test"):
        mnist1d_mlps(4, part="vali")


def test_fashion_mnist_is_read_small(monkeypatch):
    images = np.full((20, 28, 28, 1), 100, np.uint8)
    parts = {part: (images, np.arange(20) % 10) for part in ("train", "test")}
    monkeypatch.setattr(families_of_tasks, "fashion_mnist", lambda folder: parts)
    family = fashion_mnist_mlps(4)
    assert family.data["inputs"].shape == (20, 64)
    check_family(family)


def test_episodes_hold_examples_of_one_task_drawn_apart():
    family = sinusoids(4, hidden=[2])
    batch = episodes(family, 3, support=10, query=6)(family.data, KEY)
    assert batch["support"]["inputs"].shape == (3, 10, 1) and batch["query"]["mask"].shape == (3, 6)
    for i in range(3):
        x = np.concatenate([batch[part]["inputs"][i] for part in ("support", "query")])
        y = np.concatenate([batch[part]["targets"][i] for part in ("support", "query")])
        assert len(np.unique(x)) == 16  # no example twice
        design = np.concatenate([np.sin(x), np.cos(x)], 1)
        assert np.abs(design @ np.linalg.lstsq(design, y)[0] - y).max() < 1e-4  # one sinusoid fits both
    first = episodes(family, None, 10, 6)(family.data, KEY)
    assert first["support"]["inputs"].shape == (10, 1)
    again = episodes(family, 3, support=10, query=6)(family.data, KEY)
    jax.tree.map(np.testing.assert_array_equal, batch, again)


def test_episodes_are_what_drawn_takes():
    family = SMALL["classifiers"]
    task = family.task({})
    double = task._replace(
        loss=lambda v, b, k: task.loss(v, b["query"], k),
        batch={part: jax.tree.map(lambda s: Spec(s.shape, s.dtype, s.axes), task.batch) for part in ("support", "query")},
    )
    check_task(drawn(double, episodes(family, None, 4, 4), family.data))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: sinusoids(4, phase=(1.0, 1.0)), r"sinusoids: phase=\(1.0, 1.0\); allowed: a lower bound below"),
        (lambda: sinusoids(0), "task.batch=0 must be at least 1"),
        (lambda: linear_regressions(4, 2, noise=-1.0), "linear_regressions: noise=-1.0 must be at least 0"),
        (lambda: polynomials(4, -1), "polynomials: degree=-1"),
        (lambda: quadratic_bowls(3, condition=0.5), "quadratic_bowls: condition=0.5; allowed: 1 or more"),
        (lambda: classifiers(np.zeros((3, 2)), np.zeros(4, int), 2, [2]), r"classifiers: x \(3, 2\) and y \(4,\); allowed"),
        (lambda: episodes(SMALL["sinusoids"], 0, 1, 1), "episodes: n=0 must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
