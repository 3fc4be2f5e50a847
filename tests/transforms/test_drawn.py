"""Batches drawn inside the step are those that would have been given."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core.batches import nothing
from research.core.contracts import ContractError
from research.core.loop import fit
from research.learners import gradient
from research.transforms import drawn
from research.transforms._example import small_classifier
from research.transforms.drawn import example

KEY = jax.random.key(3)


def test_the_loss_is_that_of_the_batch_drawn_from_the_data_kept_in_frozen():
    task, plain = example().member, small_classifier(batch=4)
    variables = task.init(KEY)
    rows = jax.random.randint(jax.random.split(KEY)[0], (4,), 0, 10)
    data = variables["frozen"]["data"]
    batch = {"inputs": data["inputs"][rows], "targets": data["targets"][rows], "mask": jnp.ones(4)}
    wanted, _ = plain.loss(plain.init(KEY), batch, jax.random.split(KEY)[1])
    value, aux = task.loss(variables, {}, KEY)
    assert float(value) == float(wanted)
    assert aux.weight is None


def test_it_trains_on_batches_of_nothing_many_steps_a_call_as_one_by_one():
    learner = gradient(example().member, optax.sgd(0.1))
    one, many = (fit(learner, nothing(), 12, key=KEY, steps_per_call=n, log_every=12) for n in (1, 4))
    for a, b in zip(jax.tree.leaves(one["params"]), jax.tree.leaves(many["params"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    begun = learner.init(jax.random.split(KEY, 3)[0])
    assert not np.allclose(one["params"]["head"]["kernel"], begun["params"]["head"]["kernel"])


def test_what_is_not_a_batch_of_the_task_is_named():
    with pytest.raises(ContractError, match=r"drawn: draw\(data, key\): mask"):
        drawn(small_classifier(batch=4), lambda data, key: {"inputs": jnp.ones((4, 3)), "targets": jnp.zeros(4, jnp.int32)})
