"""A loss that is learned so that what it trains does well by another."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core.batches import from_function
from research.core.loop import fit
from research.learners import gradient
from research.transforms import bilevel, learned_loss, with_learned_loss
from research.transforms._example import small_classifier

KEY = jax.random.key(0)
TASK = small_classifier()


def batch(i):
    draw = np.random.default_rng(i)
    x = draw.normal(size=(8, 3)).astype(np.float32)
    return {"inputs": x, "targets": x.argmax(1).astype(np.int32), "mask": np.ones(8, np.float32)}


def test_the_loss_is_a_positive_function_of_predictions_and_targets_alone():
    task = learned_loss(TASK, 5)
    variables = task.init(KEY)
    value, aux = task.loss(variables, batch(0), KEY)
    own = {**variables, "params": variables["params"]["inner"]}
    wanted, own_aux = TASK.loss(own, batch(0), KEY)
    assert value > 0 and value != wanted
    np.testing.assert_allclose(aux.metrics["nll"][0], own_aux.metrics["nll"][0], rtol=1e-6)
    np.testing.assert_allclose(with_learned_loss(TASK, 5).loss(variables, batch(0), KEY)[0], wanted, rtol=1e-6)
    halves = [task.loss(variables, jax.tree.map(lambda x, s=s: x[s], batch(0)), KEY)[0] for s in (slice(4), slice(4, 8))]
    np.testing.assert_allclose(value, sum(halves) / 2, rtol=1e-5)


@pytest.mark.slow
def test_steps_by_a_learned_loss_come_to_lower_the_true_one():
    task = bilevel(learned_loss(TASK, 8), with_learned_loss(TASK, 8), lambda h: optax.sgd(0.5), 5, restart=True)

    def drawn(i):
        each = [batch(10 * i + j) for j in range(6)]
        return {"train": jax.tree.map(lambda *x: np.stack(x), *each[:5]), "validation": each[5]}

    learner = gradient(task, optax.adam(0.02))
    state = fit(learner, from_function(drawn), 150, key=KEY, steps_per_call=50, log_every=50)
    loss = jax.jit(task.loss)
    found = [
        np.mean([loss(v, drawn(1000 + i), jax.random.key(i))[0] for i in range(20)])
        for v in (task.init(KEY), learner.variables(state))
    ]
    assert found[1] < 0.9 * found[0]


def test_what_cannot_be_is_refused_in_one_line():
    with pytest.raises(ValueError, match="learned_loss: width=0; allowed: 1 or more"):
        learned_loss(TASK, 0)
    with pytest.raises(ValueError, match="learned_loss: method='predct' is unknown; allowed: predict; nearest: 'predict'"):
        learned_loss(TASK, method="predct")
    flat = TASK.methods["predict"]._replace(apply=lambda v, x, k: jnp.zeros(8))
    with pytest.raises(ValueError, match=r"learned_loss: predict gives \(8,\); expected \[batch, classes\]"):
        learned_loss(TASK._replace(methods={"predict": flat}))
