"""Evaluators against direct computation in NumPy, float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.evals import (
    accuracy,
    auc,
    bits_per_byte,
    bootstrap,
    collect,
    confusion_matrix,
    correct,
    mean,
    mean_of_loss,
    nll,
    squared_error,
)
from research.evals._example import linear_classifier
from research.evals.auc import area, bin_of, log_odds
from research.evals.bootstrap import fingerprint, poisson

KEY = jax.random.key(0)


def given(variables, inputs, key):
    """A method whose outputs are its inputs."""
    return inputs["inputs"]


def values(evaluator, inputs, targets, mask=None):
    inputs = np.asarray(inputs, np.float32)
    mask = np.ones(np.shape(targets), np.float32) if mask is None else np.asarray(mask, np.float32)
    batch = {"inputs": jnp.asarray(inputs), "targets": jnp.asarray(targets), "mask": jnp.asarray(mask)}
    return evaluator.finalize(jax.device_get(jax.jit(evaluator.update)(evaluator.init(), {}, batch, KEY)))


def data(shape, classes, seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((*shape, classes)) * 2,
        rng.integers(0, classes, shape),
        rng.uniform(0, 2, shape).astype(np.float32),
    )


def numpy_nll(logits, targets):
    logits = np.asarray(logits, np.float32).astype(np.float64)
    return np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]


def test_bits_per_byte_is_nats_over_bytes_and_ln_2():
    logits, targets, mask = data((4, 6), 5)
    nats = (numpy_nll(logits, targets) * mask).sum()
    table = np.array([1, 2, 3, 4, 0])
    for bytes_per_token, scored in ((1.0, mask.sum()), (2.5, 2.5 * mask.sum()), (table, (table[targets] * mask).sum())):
        found = values(bits_per_byte(given, bytes_per_token=bytes_per_token), logits, targets, mask)
        expected = {
            "bits_per_byte": nats / math.log(2) / scored,
            "nll": nats / mask.sum(),
            "perplexity": np.exp(nats / mask.sum()),
        }
        assert found.keys() == expected.keys()
        np.testing.assert_allclose([found[k] for k in expected], list(expected.values()), rtol=1e-6)


def test_uniform_logits_over_bytes_cost_eight_bits():
    found = values(bits_per_byte(given), np.zeros((2, 3, 256)), np.zeros((2, 3), np.int32))
    np.testing.assert_allclose([found["bits_per_byte"], found["perplexity"]], [8.0, 256.0], rtol=1e-6)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), np.zeros(3), np.ones((2, 2))])
def test_bytes_that_cannot_be_are_refused(bad):
    with pytest.raises(ValueError, match="bits_per_byte: bytes_per_token="):
        bits_per_byte(given, bytes_per_token=bad)


def test_top_k_accuracy_is_that_of_a_stable_sort():
    logits, targets, mask = data((200,), 6)
    logits = logits.round(0)  # with ties
    order = np.argsort(-logits, axis=1, kind="stable")
    for top, name in ((1, "accuracy"), (3, "top3_accuracy")):
        hit = (order[:, :top] == targets[:, None]).any(1)
        found = values(accuracy(given, top=top), logits, targets, mask)
        np.testing.assert_allclose(found[name], (hit * mask.astype(np.float64)).sum() / mask.sum(), rtol=1e-6)
    with pytest.raises(ValueError, match="accuracy: top=0; allowed: 1 or more"):
        accuracy(given, top=0)


def test_nan_logits_are_never_correct():
    logits = np.array([[np.nan, 0.0], [0.0, np.nan], [np.nan, np.nan], [1.0, 0.0]])
    assert values(accuracy(given), logits, np.zeros(4, np.int32)) == {"accuracy": 0.25}


def test_a_mean_may_have_more_axes_than_the_mask():
    predicted, targets = np.arange(6.0).reshape(3, 2), np.zeros((3, 2), np.float32)
    found = values(mean(given, {"mse": squared_error}), predicted, targets, [1, 0, 3])
    np.testing.assert_allclose(found["mse"], (0 + 1 + 3 * (16 + 25)) / 8)


def test_mean_of_loss_is_the_loss_and_its_metrics():
    task = linear_classifier(5, 3, 4)
    variables = task.init(KEY)
    rng = np.random.default_rng(0)
    batch = {
        "inputs": jnp.asarray(rng.standard_normal((5, 3)), jnp.float32),
        "targets": jnp.asarray(rng.integers(0, 4, 5)),
        "mask": jnp.asarray([1.0, 0, 2, 0.5, 1]),
    }
    evaluator = mean_of_loss(task)
    found = evaluator.finalize(jax.device_get(evaluator.update(evaluator.init(), variables, batch, KEY)))
    np.testing.assert_allclose(found["loss"], task.loss(variables, batch, KEY)[0], rtol=1e-6)
    assert found["nll"] == pytest.approx(found["loss"], rel=1e-6) and set(found) == {"loss", "nll"}
    unweighted = mean_of_loss(task._replace(loss=lambda *a: (task.loss(*a)[0], task.loss(*a)[1]._replace(weight=None))))
    assert set(unweighted.init()) == {"nll"}


def test_confusion_matrix_and_what_follows_from_it():
    targets, predicted = np.array([0, 0, 1, 1, 1, 2]), np.array([0, 1, 1, 1, 0, 2])
    found = values(confusion_matrix(given, 4), np.eye(4)[predicted], targets, [1, 1, 1, 1, 2, 1])
    np.testing.assert_array_equal(found["confusion_matrix"], [[1, 1, 0, 0], [2, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(found["recall"], [0.5, 0.5, 1, np.nan])
    np.testing.assert_allclose(found["precision"], [1 / 3, 2 / 3, 1, np.nan])
    assert found["balanced_accuracy"] == pytest.approx(2 / 3)
    assert found["macro_f1"] == pytest.approx((2 / 5 + 4 / 7 + 1) / 3)


def test_confusion_matrix_refuses_what_is_no_class():
    for bad in (-1, 4):
        with pytest.raises(ValueError, match="targets of weight 1 are none of 0 to 3"):
            values(confusion_matrix(given, 4), np.eye(4), np.array([0, 1, 2, bad]))
        values(confusion_matrix(given, 4), np.eye(4), np.array([0, 1, 2, bad]), [1, 1, 1, 0])
    with pytest.raises(ValueError, match="classes=3, but the method gives 4 logits"):
        values(confusion_matrix(given, 3), np.eye(4), np.zeros(4, np.int32))
    with pytest.raises(ValueError, match="confusion_matrix: classes=1; allowed: 2 or more"):
        confusion_matrix(given, 1)


def exact_auc(scores, positive, weights):
    above = (scores[positive][:, None] > scores[~positive][None]) + 0.5 * (scores[positive][:, None] == scores[~positive][None])
    pairs = np.asarray(weights, np.float64)[positive][:, None] * weights[~positive][None]
    return (above * pairs).sum() / pairs.sum()


def test_auc_is_exact_where_scores_fall_in_bins_of_their_own():
    rng = np.random.default_rng(0)
    scores = rng.integers(-40, 40, 300) / 4.0  # three significant bits more than the bins tell apart, and ties
    targets, weights = (scores + rng.standard_normal(300) * 5 > 0).astype(np.int32), rng.uniform(0, 2, 300).astype(np.float32)
    found = values(auc(given), scores, targets, weights)
    np.testing.assert_allclose(found["auc"], exact_auc(scores, targets == 1, weights), rtol=1e-6)


@pytest.mark.parametrize("bits", [10, 16, 20])
def test_auc_errs_by_no_more_than_it_says(bits):
    rng = np.random.default_rng(bits)
    scores = rng.standard_normal(500).astype(np.float32)
    targets = (rng.uniform(size=500) < 1 / (1 + np.exp(-scores))).astype(np.int32)
    found = values(auc(given, bits=bits), scores, targets)
    error = abs(found["auc"] - exact_auc(scores, targets == 1, np.ones(500)))
    assert error <= found["auc_error"] + 1e-6
    assert found["auc_error"] < {10: 0.2, 16: 3e-3, 20: 3e-4}[bits]


def test_auc_of_many_classes_is_one_against_the_rest_by_probability():
    logits, targets, weights = data((300,), 3)
    logits[np.arange(300), targets] += 1
    found = values(auc(given, 4, bits=20), np.pad(logits, ((0, 0), (0, 1)), constant_values=-1.0), targets, weights)
    logits = np.pad(logits, ((0, 0), (0, 1)), constant_values=-1.0).astype(np.float32).astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    each = [exact_auc(p[:, c], targets == c, weights) for c in range(3)]
    np.testing.assert_allclose(found["auc_per_class"], [*each, np.nan], atol=found["auc_error"] + 1e-6)
    np.testing.assert_allclose(found["auc"], np.mean(each), atol=found["auc_error"] + 1e-6)


def test_auc_of_two_logits_is_that_of_their_difference():
    logits, targets, weights = data((100,), 2)
    two, one = values(auc(given), logits, targets, weights), values(auc(given), logits[:, 1] - logits[:, 0], targets, weights)
    assert two["auc"] == pytest.approx(one["auc"], abs=one["auc_error"])


def test_auc_of_nan_scores_is_nan_unless_they_are_masked():
    scores, targets = np.array([1.0, np.nan, 0.0]), np.array([1, 1, 0])
    assert math.isnan(values(auc(given), scores, targets)["auc"])
    assert values(auc(given), scores, targets, [1, 0, 1])["auc"] == 1.0


def test_auc_refuses_what_does_not_fit():
    for options, message in (({"classes": 1}, "classes=1"), ({"bits": 9}, "bits=9"), ({"bits": 25}, "bits=25")):
        with pytest.raises(ValueError, match=f"auc: {message}; allowed"):
            auc(given, **options)
    with pytest.raises(ValueError, match=r"auc: outputs \(3, 2\) for targets \(3,\); expected \(3, 5\)"):
        values(auc(given, 5), np.ones((3, 2)), np.zeros(3, np.int32))


def test_log_odds_are_exact_where_softmax_is_one():
    logits = np.array([[0.0, 40.0, 1.0], [30.0, -50.0, 29.0], [2.0, 2.0, 2.0]])
    p_others = [np.delete(logits, c, axis=1) for c in range(3)]
    expected = np.stack([logits[:, c] - np.log(np.exp(p_others[c]).sum(1)) for c in range(3)], 1)
    np.testing.assert_allclose(log_odds(jnp.asarray(logits, jnp.float32)), expected, rtol=1e-5, atol=1e-5)


def test_bins_are_ordered_as_numbers_are():
    numbers = np.array([-np.inf, -1e30, -2.0, -1.0, -1e-30, 0.0, 1e-30, 1.0, 1.0625, 2.0, 1e30, np.inf], np.float32)
    bins = np.asarray(bin_of(jnp.asarray(numbers), 16))
    assert (np.diff(bins) > 0).all() and bins.min() >= 0 and bins.max() < 2**16
    assert bin_of(jnp.array([-0.0, 0.0]), 16).tolist() == [bins[5]] * 2


def test_area_of_separated_mixed_and_missing():
    one, other = np.array([0.0, 0, 2]), np.array([3.0, 0, 0])
    assert area(one, other) == (1.0, 0.0) and area(other, one) == (0.0, 0.0)
    assert area(one, one) == (0.5, 0.5)
    assert np.isnan(area(one, np.zeros(3))).all()


def test_bootstrap_spread_is_the_standard_error():
    logits, targets, _ = data((400,), 5)
    found = values(bootstrap(given, {"nll": nll, "accuracy": correct()}, resamples=800), logits, targets)
    each = {"nll": numpy_nll(logits, targets), "accuracy": (logits.argmax(1) == targets).astype(float)}
    for name, x in each.items():
        error = x.std() / math.sqrt(400)
        np.testing.assert_allclose(found[name], x.mean(), rtol=1e-5)
        np.testing.assert_allclose(found[f"{name}_std"], error, rtol=0.1)
        np.testing.assert_allclose(
            [found[f"{name}_low"], found[f"{name}_high"]], x.mean() + np.array([-1.96, 1.96]) * error, atol=0.3 * error
        )


def test_bootstrap_resamples_whole_rows():
    """Of a text whose windows each hold one value throughout, the spread is that of the windows, not of the tokens."""
    rng = np.random.default_rng(0)
    x = np.repeat(rng.standard_normal((50, 1)), 30, axis=1)
    found = values(bootstrap(given, {"x": lambda outputs, batch: outputs}, resamples=500), x, np.zeros((50, 30), np.int32))
    np.testing.assert_allclose(found["x_std"], x[:, 0].std() / math.sqrt(50), rtol=0.15)


def test_bootstrap_levels_nest_and_bad_ones_are_refused():
    logits, targets, _ = data((100,), 3)
    wide, narrow = (
        values(bootstrap(given, {"nll": nll}, resamples=200, level=level), logits, targets) for level in (0.99, 0.5)
    )
    assert wide["nll_low"] < narrow["nll_low"] < narrow["nll"] < narrow["nll_high"] < wide["nll_high"]
    with pytest.raises(ValueError, match="bootstrap: level=1.0; allowed"):
        bootstrap(given, {"nll": nll}, level=1.0)
    with pytest.raises(ValueError, match="bootstrap: resamples=1; allowed"):
        bootstrap(given, {"nll": nll}, resamples=1)


def test_poisson_draws_have_their_probabilities():
    draws = np.asarray(poisson(KEY, 40000)).astype(int)
    expected = [math.exp(-1) / math.factorial(k) for k in range(5)]
    np.testing.assert_allclose(np.bincount(draws, minlength=5)[:5] / 40000, expected, atol=0.01)
    np.testing.assert_allclose([draws.mean(), draws.var()], [1, 1], atol=0.03)


def test_fingerprints_depend_on_all_of_a_row_and_on_nothing_else():
    rng = np.random.default_rng(0)
    batch = {"inputs": jnp.asarray(rng.standard_normal((6, 2, 3)), jnp.float32), "targets": jnp.arange(6) - 3}
    ids = np.asarray(fingerprint(batch, ("inputs", "targets")))
    assert len({tuple(i) for i in ids.tolist()}) == 6
    half = jax.tree.map(lambda x: x[3:], batch)
    np.testing.assert_array_equal(fingerprint(half, ("inputs", "targets")), ids[3:])
    for changed in (
        {**batch, "inputs": batch["inputs"].at[2, 1, 2].add(1e-3)},
        {**batch, "targets": batch["targets"].at[2].add(1)},
        {**batch, "inputs": batch["inputs"].at[2].set(batch["inputs"][2, ::-1])},
    ):
        other = np.asarray(fingerprint(changed, ("inputs", "targets")))
        assert (other[2] != ids[2]).all()
        np.testing.assert_array_equal(np.delete(other, 2, 0), np.delete(ids, 2, 0))


def test_collect_keeps_names_and_refuses_to_give_one_twice():
    logits, targets, _ = data((10,), 3)
    both = values(collect({"a": accuracy(given), "b": bits_per_byte(given)}), logits, targets)
    assert both == {**values(accuracy(given), logits, targets), **values(bits_per_byte(given), logits, targets)}
    with pytest.raises(ValueError, match="collect: 'a' and 'b' both give 'accuracy'; allowed with prefix=True"):
        collect({"a": accuracy(given), "b": accuracy(given)})
    assert set(values(collect({"a": accuracy(given), "b": accuracy(given)}, prefix=True), logits, targets)) == {
        "a/accuracy",
        "b/accuracy",
    }
    with pytest.raises(ValueError, match="no evaluator"):
        collect({})
