"""Learning from another network's outputs."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from research.core import metrics
from research.core.contracts import abstract_batch, abstract_key, abstract_variables, check_same, check_variables
from research.core.names import choose
from research.core.types import Array, Aux, Batch, Example, Key, Method, Task, Tree, Variables
from research.transforms._example import small_classifier
from research.transforms._trees import axes_of, inside


def divergence(teacher: Array, student: Array, temperature: float) -> Array:
    """KL(p || q) of p = softmax(teacher / T), q = softmax(student / T), nats, float32: logits [..., classes] -> [...]."""
    log_p, log_q = (
        jax.nn.log_softmax(x.astype(jnp.promote_types(x.dtype, jnp.float32)) / temperature) for x in (teacher, student)
    )
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def distill(
    task: Task,
    teacher: Task,
    *,
    temperature: float = 2.0,
    weight: float = 0.5,
    method: str = "predict",
    teacher_method: str = "predict",
    mask: str = "mask",
) -> Task:
    """(1 - weight) x the task's loss + weight x T^2 x mean over batch[mask] of KL(teacher || student), both softened by the
    temperature T (Hinton et al. 2015, arXiv 1503.02531, section 2: their cross entropy with soft targets has the same
    gradient, and T^2 keeps its size beside the hard loss as T changes).

    Both methods give logits [..., classes] from the leaves of the batch that their inputs name; the student's runs as in
    evaluation, so dropout is off in the soft part. frozen is {"task": the task's own, "teacher": the teacher's Variables}; a
    new one has the teacher untrained: give it the trained ones by a stage's `enter`, see `teach`. Metric added:
    "distillation", the divergence. The task's own loss must be a mean weighted by the same mask for Aux.weight to hold.

    Raises ValueError (one line): temperature not above 0, weight not from 0 to 1, a method that is not there, inputs that the
    batch lacks, or logits of different shapes.
    """
    if not temperature > 0:
        raise ValueError(f"distill: temperature={temperature}; allowed: above 0")
    if not 0 <= weight <= 1:
        raise ValueError(f"distill: weight={weight}; allowed: from 0 to 1")
    student_apply = _on_batch(choose(task.methods, method, "distill: method"), task.batch, "student")
    teacher_apply = _on_batch(choose(teacher.methods, teacher_method, "distill: teacher_method"), task.batch, "teacher")
    _check_logits(student_apply, task, teacher_apply, teacher)

    def init(key: Key) -> Variables:
        k_task, k_teacher = jax.random.split(key)
        own = task.init(k_task)
        return {**own, "frozen": {"task": own["frozen"], "teacher": teacher.init(k_teacher)}}

    def loss(variables: Variables, batch: Batch, key: Key) -> tuple[Array, Aux]:
        k_loss, k_student, k_teacher = jax.random.split(key, 3)
        frozen, own = variables["frozen"], inside(variables, variables["frozen"]["task"])
        hard, aux = task.loss(own, batch, k_loss)
        wanted = jax.lax.stop_gradient(teacher_apply(frozen["teacher"], batch, k_teacher))
        pair = metrics.masked(divergence(wanted, student_apply(own, batch, k_student), temperature), batch[mask])
        value = (1 - weight) * hard + weight * temperature**2 * metrics.mean(pair)
        return value, aux._replace(metrics={**aux.metrics, "distillation": pair})

    def lifted(method: Method) -> Method:
        return method._replace(apply=lambda v, inputs, key: method.apply(inside(v, v["frozen"]["task"]), inputs, key))

    own_axes = axes_of(task)
    axes = {**own_axes, "frozen": {"task": own_axes["frozen"], "teacher": axes_of(teacher)}}
    return task._replace(init=init, loss=loss, methods={name: lifted(m) for name, m in task.methods.items()}, axes=axes)


Applied = Callable[[Variables, Batch, Key], Array]


def _on_batch(method: Method, batch: Tree, who: str) -> Applied:
    if not isinstance(method.inputs, dict):
        raise ValueError(f"distill: the inputs of the {who}'s method are not a dict of what the batch has")
    for name in method.inputs:
        if name not in batch:
            raise ValueError(f"distill: the {who}'s method takes {name!r}, which the batch lacks; it has: {', '.join(batch)}")
    return lambda variables, batch, key: method.apply(variables, {name: batch[name] for name in method.inputs}, key)


def _check_logits(student_apply: Applied, task: Task, teacher_apply: Applied, teacher: Task) -> None:
    batch, key = abstract_batch(task.batch), abstract_key()
    ours = jax.eval_shape(student_apply, abstract_variables(task), batch, key)
    theirs = jax.eval_shape(teacher_apply, abstract_variables(teacher), batch, key)
    if getattr(ours, "shape", None) is None or ours.shape != getattr(theirs, "shape", None):
        found = [getattr(x, "shape", type(x).__name__) for x in (ours, theirs)]
        raise ValueError(f"distill: the student gives {found[0]}, the teacher {found[1]}; expected logits of one shape")


def teach(task: Task, teacher: Variables) -> Callable[[Variables | None, Key], Variables]:
    """The `enter` of a stage of `task = distill(...)`: puts the trained variables of the teacher, such as `load_run`
    gives them, in frozen["teacher"], and takes params, state and frozen of the student from the stage before, if there
    was one.

    Raises ContractError (one line: path, expected, got) where they are not shaped as the task's.
    """
    expected = abstract_variables(task)
    check_same(expected["frozen"]["teacher"], teacher, "teach: teacher")

    def enter(variables: Variables | None, key: Key) -> Variables:
        if variables is None:
            new = task.init(key)
            return {**new, "frozen": {**new["frozen"], "teacher": teacher}}
        entered = {**variables, "frozen": {"task": variables["frozen"], "teacher": teacher}}
        check_variables(entered, expected, "teach: variables")
        return entered

    return enter


def example() -> Example:
    return Example(distill(small_classifier(), small_classifier(width=6), temperature=3.0, weight=0.7))
