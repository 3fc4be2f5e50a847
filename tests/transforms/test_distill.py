"""Distillation against its formula, and where the teacher lives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core import contracts
from research.core.types import Method
from research.estimates import accumulated, exact
from research.learners import gradient
from research.transforms import distill, over_tasks, teach
from research.transforms._example import small_classifier
from research.transforms.distill import divergence

KEY = jax.random.key(0)
STUDENT, TEACHER = small_classifier(), small_classifier(width=6)
TASK = distill(STUDENT, TEACHER, temperature=3.0, weight=0.7)
VARIABLES = TASK.init(KEY)
BATCH = {
    "inputs": jax.random.normal(jax.random.key(1), (8, 3)),
    "targets": jnp.arange(8) % 3,
    "mask": jnp.array([1.0, 0, 1, 1, 0.5, 0, 1, 2]),
}
OWN = {**VARIABLES, "frozen": VARIABLES["frozen"]["task"]}


def logits(task, variables):
    return np.asarray(task.methods["predict"].apply(variables, BATCH, KEY), np.float64)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_the_loss_is_the_formula_in_float64():
    hard = float(STUDENT.loss(OWN, BATCH, KEY)[0])
    p = softmax(logits(TEACHER, VARIABLES["frozen"]["teacher"]) / 3.0)
    q = softmax(logits(STUDENT, OWN) / 3.0)
    mask = np.asarray(BATCH["mask"], np.float64)
    soft = ((p * np.log(p / q)).sum(-1) * mask).sum() / mask.sum()
    loss, aux = TASK.loss(VARIABLES, BATCH, KEY)
    np.testing.assert_allclose(loss, 0.3 * hard + 0.7 * 9.0 * soft, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["distillation"][0] / aux.metrics["distillation"][1], soft, rtol=1e-5)
    assert aux.weight == mask.sum() and set(aux.metrics) == {"nll", "distillation"}


def test_the_gradient_is_that_of_hintons_cross_entropy():
    t, s = jax.random.normal(KEY, (4, 5)), jax.random.normal(jax.random.key(2), (4, 5))
    found = jax.grad(lambda s: divergence(t, s, 2.0).sum())(s)
    np.testing.assert_allclose(found, (softmax(np.asarray(s) / 2) - softmax(np.asarray(t) / 2)) / 2, rtol=1e-4, atol=1e-6)


def test_gradients_keep_their_size_as_the_temperature_grows():
    """At high temperature T^2 x the gradient tends to (s - t) / classes, centred: Hinton et al., eq. 4."""
    t, s = jax.random.normal(KEY, (4, 5)), jax.random.normal(jax.random.key(2), (4, 5))
    centred = (s - s.mean(1, keepdims=True)) - (t - t.mean(1, keepdims=True))
    found = jax.grad(lambda s: 100.0**2 * divergence(t, s, 100.0).sum())(s)
    np.testing.assert_allclose(found, centred / 5, rtol=0.1, atol=2e-3)


def test_extreme_logits_and_equal_ones_are_safe():
    x = jnp.array([[1e4, -1e4, 0.0]])
    assert divergence(x, x, 1.0) == 0 and np.isfinite(jax.grad(lambda s: divergence(x, s, 1.0).sum())(x)).all()


def test_weight_0_is_the_task_and_weight_1_the_teacher_alone():
    hard = distill(STUDENT, TEACHER, weight=0.0)
    np.testing.assert_allclose(hard.loss(VARIABLES, BATCH, KEY)[0], STUDENT.loss(OWN, BATCH, KEY)[0], rtol=1e-6)
    soft = distill(STUDENT, TEACHER, weight=1.0)
    other = {**BATCH, "targets": (BATCH["targets"] + 1) % 3}
    assert soft.loss(VARIABLES, BATCH, KEY)[0] == soft.loss(VARIABLES, other, KEY)[0]


def test_it_splits_exactly():
    whole = exact().grads({}, TASK, VARIABLES, BATCH, KEY)
    parts = accumulated(4).grads({}, TASK, VARIABLES, BATCH, KEY)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), (whole[0], whole[2]), (parts[0], parts[2])
    )


def test_the_teacher_is_an_argument_that_training_does_not_touch():
    learner = gradient(TASK, optax.sgd(0.1))
    contracts.check_learner(learner)  # tells a constant that is closed over, and a frozen that does not pass through
    state = learner.init(KEY)
    after, _ = jax.jit(learner.step)(state, BATCH, KEY)
    jax.tree.map(np.testing.assert_array_equal, after["frozen"], state["frozen"])
    other = {**state, "frozen": {**state["frozen"], "teacher": TEACHER.init(jax.random.key(9))}}
    assert (learner.step(other, BATCH, KEY)[0]["params"]["head"]["bias"] != after["params"]["head"]["bias"]).any()


def test_methods_and_axes_are_the_students():
    np.testing.assert_array_equal(
        TASK.methods["predict"].apply(VARIABLES, BATCH, KEY), STUDENT.methods["predict"].apply(OWN, BATCH, KEY)
    )
    assert TASK.axes["params"] == STUDENT.axes["params"]
    assert TASK.axes["frozen"] == {"task": STUDENT.axes["frozen"], "teacher": TEACHER.axes}
    bare = distill(STUDENT._replace(axes=None), TEACHER._replace(axes=None))
    contracts.check_task(bare)


def test_a_student_learns_a_teachers_outputs():
    trained = TEACHER.init(jax.random.key(5))
    task = distill(STUDENT, TEACHER, temperature=2.0, weight=1.0)
    variables = teach(task, trained)(None, KEY)
    learner = gradient(task, optax.adam(0.05))
    state, step = learner.init(KEY, variables), jax.jit(learner.step)
    found = []
    for i in range(150):
        inputs = jax.random.normal(jax.random.fold_in(KEY, i), (8, 3))
        state, metrics = step(state, {**BATCH, "inputs": inputs, "mask": jnp.ones(8)}, KEY)
        found.append(float(metrics["distillation"][0] / 8))
    assert np.mean(found[-10:]) < 0.1 * np.mean(found[:3])


def test_teach_takes_the_student_from_the_stage_before():
    before, trained = STUDENT.init(jax.random.key(3)), TEACHER.init(jax.random.key(4))
    entered = teach(TASK, trained)(before, KEY)
    expected = {**before, "frozen": {"task": before["frozen"], "teacher": trained}}
    jax.tree.map(np.testing.assert_array_equal, entered, expected)
    fresh = teach(TASK, trained)(None, KEY)
    jax.tree.map(np.testing.assert_array_equal, fresh, {**VARIABLES, "frozen": {"task": OWN["frozen"], "teacher": trained}})


def test_teach_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"teach: teacher: params/head/kernel: expected float32\[6,3\], got float32\[4,3\]"):
        teach(TASK, STUDENT.init(KEY))
    with pytest.raises(ValueError, match=r"teach: variables: params/head/kernel: expected float32\[4,3\], got float32\[6,3\]"):
        teach(TASK, TEACHER.init(KEY))(TEACHER.init(KEY), KEY)


def test_it_composes_with_over_tasks():
    many = over_tasks(TASK, 2)
    contracts.check_task(many)
    two = jax.tree.map(lambda x: jnp.stack([x, x]), BATCH)
    np.testing.assert_allclose(many.loss(VARIABLES, two, KEY)[0], TASK.loss(VARIABLES, BATCH, KEY)[0], rtol=1e-5)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: distill(STUDENT, TEACHER, temperature=0.0), "distill: temperature=0.0; allowed: above 0"),
        (lambda: distill(STUDENT, TEACHER, weight=1.5), "distill: weight=1.5; allowed: from 0 to 1"),
        (lambda: distill(STUDENT, TEACHER, method="predct"), "distill: method='predct' is unknown; allowed: predict; nearest"),
        (lambda: distill(STUDENT, small_classifier(classes=4)), r"the student gives \(8, 3\), the teacher \(8, 4\)"),
        (
            lambda: distill(
                STUDENT, TEACHER._replace(methods={"predict": Method(lambda v, x, k: x["pixels"], {"pixels": None})})
            ),
            "distill: the teacher's method takes 'pixels', which the batch lacks; it has: inputs, targets, mask",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
