"""Accuracy over episodes with its interval, and the nearest neighbour that learns nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.evals import episode_accuracy, nearest_neighbour

KEY = jax.random.key(0)


def an_episode(draw, episodes=6, ways=3, shots=2, queries=4):
    def part(each):
        y = np.tile(np.repeat(np.arange(ways), each), (episodes, 1))
        x = np.eye(ways)[y] + 0.6 * draw.normal(size=(episodes, ways * each, ways))
        return {"inputs": jnp.float32(x), "targets": jnp.int32(y), "mask": jnp.ones(y.shape)}

    return {"support": part(shots), "query": part(queries)}


def measured(batches, ways=3):
    evaluator = episode_accuracy(nearest_neighbour(ways))
    stats, update = evaluator.init(), jax.jit(evaluator.update)
    for batch in batches:
        stats = update(stats, {}, batch, KEY)
    return evaluator.finalize(jax.device_get(stats))


def shares(batch):
    """By loops."""
    out = []
    for x, y, q, z in zip(*(np.asarray(batch[p][k]) for p in ("support", "query") for k in ("inputs", "targets"))):
        nearest = [y[np.argmin([np.linalg.norm(b - a) for a in x])] for b in q]
        out.append(np.mean(np.asarray(nearest) == z))
    return out


def test_it_is_the_mean_over_episodes_with_its_normal_interval():
    draw = np.random.default_rng(0)
    batches = [an_episode(draw) for _ in range(3)]
    expected = np.concatenate([shares(batch) for batch in batches])
    found = measured(batches)
    assert found["episodes"] == 18 and 0.4 < found["accuracy"] < 1
    assert found["accuracy"] == pytest.approx(expected.mean(), rel=1e-6)
    assert found["accuracy_interval"] == pytest.approx(1.96 * expected.std(ddof=1) / 18**0.5, rel=1e-4)


def test_masked_queries_and_examples_count_nothing():
    batch = an_episode(np.random.default_rng(1))
    query, support = batch["query"], batch["support"]
    wrong = {**query, "targets": query["targets"].at[:, 0].set(2), "mask": query["mask"].at[:, 0].set(0)}
    left_out = {k: v[:, 1:] for k, v in query.items()}
    far = {**support, "inputs": support["inputs"].at[:, 1].set(query["inputs"][:, 3]), "mask": support["mask"].at[:, 1].set(0)}
    gone = {k: jnp.delete(v, 1, axis=1) for k, v in support.items()}
    assert measured([{"support": far, "query": wrong}]) == measured([{"support": gone, "query": left_out}])
    nobody = {**query, "mask": query["mask"].at[2:].set(0)}
    assert measured([{"support": support, "query": nobody}])["episodes"] == 2


def test_of_one_episode_there_is_no_interval():
    one = jax.tree.map(lambda x: x[:1], an_episode(np.random.default_rng(2)))
    assert np.isnan(measured([one])["accuracy_interval"]) and np.isnan(measured([])["accuracy"])
