"""Tasks that read a support, and learned activations, against what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core.batches import nothing
from research.core.loop import fit
from research.learners import gradient
from research.tasks import hypernetwork, learned_activation, neural_process
from research.tasks.families import episodes, linear_regressions
from research.transforms import drawn, over_tasks

KEY = jax.random.key(0)
SIZES = {"features": 1, "outputs": 1, "support": 5, "query": 4, "encoder": [8], "width": 8, "activation": "tanh"}
PROCESS = neural_process(**SIZES, decoder=[8])
HYPER = hypernetwork(**SIZES, hidden=[3])
BATCH = episodes(linear_regressions(4, 1), None, 5, 4)({}, KEY)


@pytest.mark.parametrize("task", [PROCESS, HYPER], ids=["neural_process", "hypernetwork"])
def test_a_support_is_a_set_whose_masked_examples_count_nothing(task):
    variables = task.init(KEY)

    @jax.jit
    def predicted(support):
        return task.methods["predict"].apply(variables, {"support": support, "query": BATCH["query"]}, KEY)

    mask = jnp.array([1.0, 1, 0, 1, 1])
    support = {**BATCH["support"], "mask": mask}
    other = {**support, "inputs": support["inputs"].at[2].set(9.0), "targets": support["targets"].at[2].set(jnp.nan)}
    turned = jax.tree.map(lambda x: x[::-1], support)
    for same in (other, turned):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), predicted(support), predicted(same))
    empty = predicted({**support, "mask": jnp.zeros(5)})
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(empty))
    pairs = zip(jax.tree.leaves(predicted(support)), jax.tree.leaves(empty), strict=True)
    assert any((a != b).any() for a, b in pairs)  # it does read the support


def test_a_process_is_scored_by_its_likelihood():
    variables = PROCESS.init(KEY)
    found = PROCESS.methods["predict"].apply(variables, BATCH, KEY)
    mean, scale = (np.asarray(found[k], np.float64) for k in ("mean", "scale"))
    y = np.asarray(BATCH["query"]["targets"], np.float64)
    nll = (0.5 * ((y - mean) / scale) ** 2 + np.log(scale) + 0.5 * np.log(2 * np.pi)).sum(-1)
    value, aux = PROCESS.loss(variables, BATCH, KEY)
    assert float(value) == pytest.approx(nll.mean(), rel=1e-5) and scale.min() > 0.1 and aux.weight == 4


def test_generated_weights_are_those_of_the_network_that_answers():
    variables = HYPER.init(KEY)
    made = HYPER.methods["generate"].apply(variables, {"support": BATCH["support"]}, KEY)
    x = BATCH["query"]["inputs"]
    hidden = jnp.tanh(x @ made["layers"]["0"]["kernel"] + made["layers"]["0"]["bias"][None])
    wanted = hidden @ made["head"]["kernel"] + made["head"]["bias"][None]
    np.testing.assert_allclose(HYPER.methods["predict"].apply(variables, BATCH, KEY), wanted, rtol=1e-5, atol=1e-6)
    near = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), made, variables["params"]["base"])
    assert max(map(float, jax.tree.leaves(near))) < 0.1  # it begins near weights that any support shares


@pytest.mark.slow
def test_they_learn_from_episodes_of_a_family():
    family = linear_regressions(4, 1)
    task = drawn(over_tasks(PROCESS, 16), episodes(family, 16, 5, 4), family.data)
    learner, seen = gradient(task, optax.adam(0.01)), []
    state = fit(learner, nothing(), 300, key=KEY, steps_per_call=100, log_every=100)
    for variables in (task.init(KEY), learner.variables(state)):
        loss = jax.jit(jax.vmap(lambda k, v=variables: task.loss(v, {}, k)[1].metrics["mse"][0]))
        seen.append(float(loss(jax.random.split(KEY, 20)).mean()))
    assert seen[1] < 0.7 * seen[0]


def test_a_learned_activation_is_elu_and_a_network():
    task = learned_activation(features=3, classes=4, batch=6, hidden=5, width=7, noise=0.0)
    variables = task.init(KEY)
    x = jnp.linspace(-3, 3, 6)
    outer = variables["params"]["outer"]
    hidden = jnp.tanh(x[:, None] @ outer["layers"]["0"]["kernel"] + outer["layers"]["0"]["bias"][None])
    wanted = jax.nn.elu(x) + 0.2 * (hidden @ outer["head"]["kernel"] + outer["head"]["bias"][None])[:, 0]
    found = task.methods["activation"].apply(variables, {"inputs": x}, KEY)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    batch = {"inputs": jax.random.normal(KEY, (6, 3)), "targets": jnp.arange(6) % 4, "mask": jnp.ones(6)}
    logits = jax.nn.log_softmax(task.methods["predict"].apply(variables, batch, KEY))
    wanted = -logits[jnp.arange(6), batch["targets"]].mean()
    np.testing.assert_allclose(task.loss(variables, batch, KEY)[0], wanted, rtol=1e-5)  # without noise, the same
    noisy = learned_activation(features=3, classes=4, batch=6, hidden=5, width=7, noise=0.5)
    assert noisy.loss(variables, batch, KEY)[0] != noisy.loss(variables, batch, jax.random.key(1))[0]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: neural_process(features=1, outputs=1, support=0, query=4), "task.support=0 must be at least 1"),
        (lambda: hypernetwork(features=1, outputs=1, support=3, query=0), "task.query=0 must be at least 1"),
        (lambda: learned_activation(features=3, classes=4, batch=6, width=0), "task.width=0 must be at least 1"),
        (lambda: learned_activation(features=3, classes=4, batch=6, noise=-1.0), "task.noise=-1.0 must be at least 0"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
