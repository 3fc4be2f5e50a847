"""A broken contract is told in one line, with path, expected and got, before anything compiles."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core import contracts
from research.core.contracts import ContractError
from research.core.types import Aux, Estimate, Evaluator, Learner, Method, Spec, Task

ROWS = Spec((4, 3), jnp.float32, ("batch", None))
BATCH = {"inputs": ROWS, "mask": Spec((4,), jnp.float32, ("batch",))}


def init(key):
    return {
        "params": {"w": jax.random.normal(key, (3,))},
        "state": {"bn": {"mean": jnp.zeros(3), "count": jnp.zeros((), jnp.int32)}},
        "frozen": {"teacher": jnp.ones(3)},
    }


def loss(variables, batch, key):
    errors, mask = (batch["inputs"] @ variables["params"]["w"]) ** 2, batch["mask"]
    total, weight = (errors * mask).sum(), mask.sum()
    return total / weight, Aux(variables["state"], {"mse": (total, weight)}, weight)


def predict(variables, inputs, key):
    return inputs["inputs"] @ variables["params"]["w"]


AXES = {
    "params": {"w": jax.P("embed")},
    "state": {"bn": {"mean": jax.P("embed"), "count": jax.P()}},
    "frozen": {"teacher": jax.P("embed")},
}
TASK = Task(init, loss, {"predict": Method(predict, {"inputs": ROWS})}, BATCH, AXES, {"bn/mean": "max"})


def initial(**groups):
    return TASK._replace(init=lambda key: {**init(key), **groups}, axes=None, merge={})


def returning(change):
    """The task with (value, Aux) changed by `change`."""
    return TASK._replace(loss=lambda v, b, k: change(*loss(v, b, k)))


def metric(pair):
    return returning(lambda value, aux: (value, aux._replace(metrics={"mse": pair})))


BROKEN_TASKS = {
    "no task": ({}, "task: expected a Task, got dict {}"),
    "groups": (
        TASK._replace(init=lambda key: {"params": {}, "state": {}}),
        "task.init: expected a dict with the keys params, state, frozen, got the keys ['params', 'state']",
    ),
    "int key": (initial(params={0: jnp.ones(3)}), "task.init: params/0: expected a str key, got int 0"),
    "list": (
        initial(params={"w": jnp.ones(3), "layers": [jnp.ones(3)]}),
        "task.init: params/layers: expected nested dicts of arrays, got list",
    ),
    "generator in state": (
        initial(state={"rng": jax.random.key(0)}),
        "task.init: state/rng: expected an array (a random key is an argument, never kept), got key<fry>[]",
    ),
    "integer params": (
        initial(params={"w": jnp.ones(3), "n": jnp.int32(3)}),
        "task.init: params/n: expected floats (others belong in state or frozen), got int32[]",
    ),
    "axes missing": (
        TASK._replace(axes={**AXES, "state": {"bn": {"mean": jax.P()}}}),
        "task.axes: state/bn/count: expected axes of int32[], got nothing",
    ),
    "axes misnamed": (
        TASK._replace(axes={**AXES, "params": {"v": jax.P()}}),
        "task.axes: params/v: expected no such leaf; nearest: 'params/w', got P()",
    ),
    "axes too long": (
        TASK._replace(axes={**AXES, "params": {"w": jax.P("embed", "mlp")}}),
        "task.axes: params/w: expected at most 1 names, got P('embed', 'mlp')",
    ),
    "axes of tuples": (
        TASK._replace(axes={**AXES, "params": {"w": jax.P(("data", "fsdp"))}}),
        "task.axes: params/w: expected a jax.P of logical names",
    ),
    "merge of no path": (
        TASK._replace(merge={"bn/means": "max"}),
        "task.merge: bn/means: expected a path in state; nearest: 'bn/mean', got no such path",
    ),
    "merge rule": (
        TASK._replace(merge={"bn/mean": "min"}),
        "merge of state bn/mean: 'min' is unknown; allowed: mean, max, sum",
    ),
    "batch of shapes": (
        TASK._replace(batch={"inputs": jnp.ones(3)}),
        "task.batch: inputs: expected a Spec, got float32[3]",
    ),
    "two batch sizes": (
        TASK._replace(batch={**BATCH, "mask": Spec((5,), jnp.float32, ("batch",))}),
        'task.batch: mask: expected a "batch" axis of 4, as inputs has, got 5',
    ),
    "no aux": (returning(lambda value, aux: value), "task.loss: expected a pair (loss, Aux), got float32[]"),
    "vector loss": (
        returning(lambda value, aux: (value * jnp.ones(2), aux)),
        "task.loss: expected a scalar float loss, got float32[2]",
    ),
    "integer loss": (
        returning(lambda value, aux: (value.astype(jnp.int32), aux)),
        "task.loss: expected a scalar float loss, got int32[]",
    ),
    "dict for Aux": (
        returning(lambda value, aux: (value, {})),
        "task.loss: expected an Aux(state, metrics, weight), got dict {}",
    ),
    "state lost": (
        returning(lambda value, aux: (value, aux._replace(state={}))),
        "task.loss: Aux.state: bn/count: expected int32[], got nothing",
    ),
    "state reshaped": (
        returning(lambda value, aux: (value, aux._replace(state={"bn": {**aux.state["bn"], "mean": jnp.zeros(4)}}))),
        "task.loss: Aux.state: bn/mean: expected float32[3], got float32[4]",
    ),
    "state recast": (
        returning(lambda value, aux: (value, aux._replace(state=jax.tree.map(lambda x: x.astype(jnp.bfloat16), aux.state)))),
        "task.loss: Aux.state: bn/count: expected int32[], got bfloat16[]",
    ),
    "bare metric": (metric(jnp.ones(())), "task.loss: Aux.metrics: mse: expected a pair (sum, weight), got float32[]"),
    "three of a metric": (
        metric((jnp.ones(()),) * 3),
        "task.loss: Aux.metrics: mse: expected a pair (sum, weight), got tuple",
    ),
    "weight of another shape": (
        metric((jnp.ones(2), jnp.ones(3))),
        "task.loss: Aux.metrics: mse: expected a weight of shape () or (2,), got float32[3]",
    ),
    "vector weight": (
        returning(lambda value, aux: (value, aux._replace(weight=jnp.ones(4)))),
        "task.loss: Aux.weight: expected a float scalar or None, got float32[4]",
    ),
    "no Method": (TASK._replace(methods={"predict": predict}), "task.methods['predict']: expected a Method, got function"),
}


@pytest.mark.parametrize("name", BROKEN_TASKS)
def test_a_broken_task_is_told_in_one_line(name):
    task, said = BROKEN_TASKS[name]
    with pytest.raises(ValueError) as error:
        contracts.check_task(task)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_a_sound_task_passes_and_gives_its_abstract_variables():
    assert contracts.check_task(TASK)["params"]["w"].shape == (3,)
    assert contracts.check_task(TASK._replace(axes=None, merge={}, methods={}))["frozen"]["teacher"].dtype == jnp.float32


def test_what_a_task_raises_itself_passes_through():
    def raising(variables, batch, key):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        contracts.check_task(TASK._replace(loss=raising))


def begin(key, variables=None):
    variables = init(key) if variables is None else variables
    return {"step": jnp.zeros((), jnp.int32), **variables, "opt": optax.sgd(0.1).init(variables["params"])}


def step(state, batch, key):
    value, aux = loss(state, batch, key)
    return {**state, "step": state["step"] + 1, "state": aux.state}, {"loss": (value, jnp.ones(()))}


def variables_of(state):
    return {group: state[group] for group in ("params", "state", "frozen")}


LEARNER = Learner(
    begin,
    step,
    variables_of,
    TASK.methods,
    BATCH,
    {"step": jax.P(), **AXES, "opt": jax.tree.map(lambda _: jax.P(), begin(jax.random.key(0))["opt"])},
)


def beginning(**parts):
    return LEARNER._replace(init=lambda key, variables=None: {**begin(key, variables), **parts})


def stepping(change):
    return LEARNER._replace(step=lambda s, b, k: change(*step(s, b, k)))


BIG = np.ones(contracts.CLOSED_OVER_LIMIT // 4 + 1, np.float32)
BROKEN_LEARNERS = {
    "no learner": (TASK, "learner: expected a Learner, got Task"),
    "no frozen": (
        LEARNER._replace(init=lambda key, variables=None: {"step": jnp.int32(0)}),
        'learner.init: expected a dict with "step" and "frozen", got the keys [\'step\']',
    ),
    "float step": (beginning(step=jnp.zeros(())), "learner.init: step: expected int32[], got float32[]"),
    "stacked step": (beginning(step=jnp.zeros(2, jnp.int32)), "learner.init: step: expected int32[], got int32[2]"),
    "axes": (
        LEARNER._replace(axes={**LEARNER.axes, "params": {}}),
        "learner.axes: params/w: expected axes of float32[3], got nothing",
    ),
    "state lost": (
        stepping(lambda s, m: ({k: v for k, v in s.items() if k != "params"}, m)),
        "learner.step: State: params/w: expected float32[3], got nothing",
    ),
    "state gained": (
        stepping(lambda s, m: ({**s, "param": s["params"]}, m)),
        "learner.step: State: param/w: expected no such leaf, got float32[3]",
    ),
    "step recast": (
        stepping(lambda s, m: ({**s, "step": s["step"] * 1.0}, m)),
        "learner.step: State: step: expected int32[], got float32[]",
    ),
    "containers": (
        stepping(lambda s, m: ({**s, "opt": [*s["opt"]]}, m)),
        "learner.step: State: expected the containers PyTreeDef(",
    ),
    "no loss": (stepping(lambda s, m: (s, {"mse": m["loss"]})), 'learner.step: metrics: expected a "loss", got only mse'),
    "frozen moved": (
        stepping(lambda s, m: ({**s, "frozen": jax.tree.map(lambda x: x + 0, s["frozen"])}, m)),
        "learner.step: State: frozen/teacher: expected the array it was given, untouched, got another float32[3]",
    ),
    "frozen exchanged": (
        stepping(lambda s, m: ({**s, "frozen": {"teacher": s["params"]["w"]}}, m)),
        "learner.step: State: frozen/teacher: expected the array it was given, untouched, got another float32[3]",
    ),
    "frozen moved within jit": (
        LEARNER._replace(
            step=jax.jit(lambda s, b, k: ({**s, "frozen": {"teacher": s["frozen"]["teacher"] * 2}}, step(s, b, k)[1]))
        ),
        "learner.step: State: frozen/teacher: expected the array it was given, untouched",
    ),
    "closed over": (
        stepping(lambda s, m: (s, {"loss": (m["loss"][0] + jnp.asarray(BIG).sum(), m["loss"][1])})),
        "learner.step: expected no constant above 4194304 bytes (pass it in frozen), got float32[1048577]",
    ),
    "closed over within jit": (
        LEARNER._replace(step=jax.jit(lambda s, b, k: (s, {"loss": (jnp.asarray(BIG).sum() + s["step"], jnp.ones(()))}))),
        "learner.step: expected no constant above 4194304 bytes (pass it in frozen), got float32[1048577]",
    ),
    "variables": (
        LEARNER._replace(variables=lambda s: {"params": s["params"]}),
        "learner.variables: expected a dict with the keys params, state, frozen, got the keys ['params']",
    ),
    "init forgets the variables' form": (
        LEARNER._replace(init=lambda key, variables=None: begin(key) if variables is None else {**begin(key), "opt": {}}),
        "learner.init with variables: State: expected the containers",
    ),
}


@pytest.mark.parametrize("name", BROKEN_LEARNERS)
def test_a_broken_learner_is_told_in_one_line(name):
    learner, said = BROKEN_LEARNERS[name]
    with pytest.raises(ContractError) as error:
        contracts.check_learner(learner)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, lambda f: jax.jit(jax.jit(f))])
def test_a_sound_learner_passes_also_where_its_step_is_jitted_already(wrap):
    contracts.check_learner(LEARNER._replace(step=wrap(step)))


def host_batch():
    return {"inputs": np.zeros((4, 3), np.float32), "mask": np.ones(4, np.float32)}


BROKEN_BATCHES = {
    "missing": ({"inputs": host_batch()["inputs"]}, "shard 3: mask: expected float32[4], got nothing"),
    "misnamed": (
        {"inputs": host_batch()["inputs"], "masks": np.ones(4, np.float32)},
        "shard 3: masks: expected no such leaf; nearest: 'mask', got float32[4]",
    ),
    "dtype": ({**host_batch(), "mask": np.ones(4)}, "shard 3: mask: expected float32[4], got float64[4]"),
    "shape": (
        {**host_batch(), "inputs": np.zeros((3, 3), np.float32)},
        "shard 3: inputs: expected float32[4,3], got float32[3,3]",
    ),
    "no array": ({**host_batch(), "mask": 1.0}, "shard 3: mask: expected float32[4], got float 1.0"),
}


@pytest.mark.parametrize("name", BROKEN_BATCHES)
def test_a_batch_that_does_not_fit_is_told_in_one_line(name):
    batch, said = BROKEN_BATCHES[name]
    with pytest.raises(ContractError) as error:
        contracts.check_batch(batch, BATCH, "shard 3")
    assert str(error.value) == said


def test_a_batch_may_have_leading_steps_where_it_is_said():
    stacked = jax.tree.map(lambda x: np.stack([x, x]), host_batch())
    contracts.check_batch(host_batch(), BATCH)
    contracts.check_batch(stacked, BATCH, leading=1)
    with pytest.raises(ContractError, match=r"batch: inputs: expected float32\[4,3\], got float32\[2,4,3\]"):
        contracts.check_batch(stacked, BATCH)
    with pytest.raises(ContractError, match=r"batch: inputs: expected float32\[2,4,3\], got float32\[2,4,5\]"):
        contracts.check_batch({**stacked, "inputs": np.zeros((2, 4, 5), np.float32)}, BATCH, leading=1)


def test_variables_are_compared_by_path_shape_and_dtype():
    expected = jax.eval_shape(init, jax.random.key(0))
    contracts.check_variables(init(jax.random.key(1)), expected)
    given = {**init(jax.random.key(1)), "frozen": {"teacher": jnp.ones((2, 3))}}
    with pytest.raises(ContractError) as error:
        contracts.check_variables(given, expected, "start")
    assert str(error.value) == "start: frozen/teacher: expected float32[3], got float32[2,3]"


def test_a_broken_estimate_is_told_in_one_line():
    def grads(memory, task, variables, batch, key):
        value, aux = task.loss(variables, batch, key)
        return value, aux, {"w": jnp.zeros(4)}, memory

    with pytest.raises(ContractError) as error:
        contracts.check_estimate(Estimate(lambda task, variables, key: {}, grads), TASK)
    assert str(error.value) == "estimate.grads: gradients: w: expected float32[3], got float32[4]"
    forgetful = Estimate(
        lambda task, variables, key: {"age": jnp.int32(0)}, lambda m, t, v, b, k: (*grads(m, t, v, b, k)[:2], v["params"], {})
    )
    with pytest.raises(ContractError, match=r"estimate.grads: memory: age: expected int32\[\], got nothing"):
        contracts.check_estimate(forgetful, TASK)


def test_an_evaluator_keeps_the_form_of_its_stats():
    variables, batch = jax.eval_shape(init, jax.random.key(0)), contracts.abstract_batch(BATCH)
    sound = Evaluator(lambda: {"sum": 0.0}, lambda s, v, b, k: {"sum": s["sum"] + b["mask"].sum()}, dict)
    contracts.check_evaluator(sound, variables, batch)
    with pytest.raises(ContractError, match=r"evaluator.update: stats: sum: expected float32\[\], got float32\[4\]"):
        contracts.check_evaluator(sound._replace(update=lambda s, v, b, k: {"sum": s["sum"] + b["mask"]}), variables, batch)
