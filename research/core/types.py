"""The contracts: NamedTuples of pure functions, in the manner of optax.

A `Task` says what is computed, an `Estimate` how its gradient is, a `Learner` how a State moves, an `Evaluator` what is
measured, a `Stage` what runs for how long. A transform is any `Task -> Task`; a learner transform is any `Learner -> Learner`.
Nothing else in the project is a framework. docs/design.md draws the picture; `research.core.contracts` checks a member.

Trees. `Variables` is `{"params", "state", "frozen"}`, nested dicts with str keys and `jax.Array` leaves:
    params   what gradients reach
    state    what a forward pass updates: batch statistics, calibration, inner problems; never a random generator
    frozen   neither: a teacher, a reference policy, a LoRA base. Never closed over, always an argument; saved once, by hash
A `State` (of a Learner) is a dict with at least a scalar int32 "step" (batches consumed, skipped ones too) and "frozen".

Axes. A tree of `jax.P` of logical axis names beside every array tree: `P("embed", "mlp")`. Only `research.core.mesh` knows
which mesh axis a logical name is laid over. "batch" names exactly the axis that `Aux.weight` sums over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

Array = jax.Array
Key = jax.Array  # a typed key, as jax.random.key gives it
Tree = Any
Variables = dict[str, Any]
State = dict[str, Any]
Batch = Any
Metrics = Mapping[str, tuple[Array, Array]]  # {name: (sum, weight)}; the value is sum / weight

GROUPS = ("params", "state", "frozen")


@dataclasses.dataclass(frozen=True)
class Spec:
    """An array to come: a leaf (a NamedTuple would be a node). `axes`: logical names, one a dimension, None where unnamed."""

    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...] = ()

    def __post_init__(self):
        axes = tuple(self.axes) + (None,) * (len(self.shape) - len(self.axes))
        if len(axes) != len(self.shape):
            raise ValueError(f"Spec: {len(self.axes)} axis names {self.axes} for a shape {self.shape}")
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))


class Aux(NamedTuple):
    """What a loss returns beside its value, taken at the parameters themselves, never at perturbed ones.

    state: the new `Variables["state"]`.
    metrics: {name: (sum, weight)}; they add up over shards, microbatches, ragged batches and tasks.
    weight: float32 scalar, what the loss is a weighted mean over (0 allowed); None where the loss is no such mean (InfoNCE,
        IRM), and then nothing may split the batch.
    """

    state: Tree
    metrics: Metrics
    weight: Array | None


class Method(NamedTuple):
    """A named use of trained variables: what evaluators, export and serving call. `inputs` are Specs and hold no labels."""

    apply: Callable[[Variables, Tree, Key], Tree]
    inputs: Tree


class Task(NamedTuple):
    """What is computed.

    init: key -> Variables.
    loss: (variables, batch, key) -> (scalar, Aux).
    methods: {name: Method}; "predict" wherever the task maps inputs to outputs.
    batch: Specs of one batch.
    axes: axes of every array in Variables; None means that nothing is named.
    merge: {path in state, such as "bn/mean": "mean" | "max" | "sum"}, how parallel copies of state become one. Unnamed paths
        take the weighted mean (floats) or the maximum (integers). A batch norm's variance under "mean" is approximate.
    """

    init: Callable[[Key], Variables]
    loss: Callable[[Variables, Batch, Key], tuple[Array, Aux]]
    methods: Mapping[str, Method]
    batch: Tree
    axes: Tree = None
    merge: Mapping[str, str] = {}


class Estimate(NamedTuple):
    """How a gradient is computed. It may keep a memory (particles, episodes), which it lays out with `axes` where a default by
    path suffix and shape does not do.

    init: (task, variables, key) -> memory.
    grads: (memory, task, variables, batch, key) -> (loss, Aux, gradients shaped as params, memory).
    axes: (task, memory) -> axes of the memory, or None for the default.
    """

    init: Callable[[Task, Variables, Key], Tree]
    grads: Callable[[Tree, Task, Variables, Batch, Key], tuple[Array, Aux, Tree, Tree]]
    axes: Callable[[Task, Tree], Tree] | None = None


class Learner(NamedTuple):
    """How a State moves.

    init: (key, variables=None) -> State; `variables`, where given, are shaped as `variables(state)` gives them (checked).
    step: (state, batch, key) -> (State, Metrics); "frozen" passes through untouched. Metrics hold "loss".
    variables: state -> Variables, what to evaluate, export, or start the next learner from.
    methods: the task's, lifted where the learner stacks variables.
    batch: Specs of one batch.
    axes: axes of State; stacked leaves start with "population".
    """

    init: Callable[..., State]
    step: Callable[[State, Batch, Key], tuple[State, Metrics]]
    variables: Callable[[State], Variables]
    methods: Mapping[str, Method]
    batch: Tree
    axes: Tree


class Evaluator(NamedTuple):
    """What is measured. Stats add up over batches and shards, so exact means, areas under curves and intervals all fit.

    init: () -> stats.
    update: (stats, variables, batch, key) -> stats; pure, compiled.
    finalize: stats -> {name: value}; on the host, values are floats or NumPy arrays. Those of `init` have the same names, NaN
        where there is nothing to say.
    """

    init: Callable[[], Tree]
    update: Callable[[Tree, Variables, Batch, Key], Tree]
    finalize: Callable[[Tree], Mapping[str, Any]]


class BatchIterator(Protocol):
    """A stream of host batches (NumPy leaves) that knows its position, as grain's iterators do."""

    def __iter__(self) -> BatchIterator: ...
    def __next__(self) -> Batch: ...
    def get_state(self) -> Mapping[str, Any]: ...  # JSON-able; the position after the batches taken so far
    def set_state(self, state: Mapping[str, Any]) -> None: ...


class Batches(NamedTuple):
    """A source of batches that can be opened again.

    open: () -> BatchIterator at the beginning. It ends by StopIteration, or never.
    fingerprint: names source, order and batching; saved beside a position and compared when one is restored.
    position: step -> state of an iterator that has given `step` batches; None if there is no such short cut, and then a
        position is reached by drawing and dropping.
    rows: (start, stop) -> the same, each batch holding these rows only, with positions and fingerprint of the whole; None where
        a batch can be made only whole.
    """

    open: Callable[[], BatchIterator]
    fingerprint: str
    position: Callable[[int], Mapping[str, Any]] | None = None
    rows: Callable[[int, int], Batches] | None = None


class TaskFamily(NamedTuple):
    """A distribution over tasks of one form: what a learned optimizer, an initialization or a context is learned over.

    sample: key -> parameters, a tree of arrays that says which task it is ({} where all are one).
    task: parameters -> Task; parameters may be traced, and Specs, axes and shapes of Variables are the same for all of them.
    batch: (parameters, data, key) -> one batch of that task, drawn afresh; pure.
    data: arrays that `batch` reads, such as a training set; transforms keep them in "frozen", never closed over.
    """

    sample: Callable[[Key], Tree]
    task: Callable[[Tree], Task]
    batch: Callable[[Tree, Tree, Key], Batch]
    data: Tree = {}


class LearnedOptimizer(NamedTuple):
    """An optimizer that is learned: its own parameters, theta, and what they make.

    init: key -> theta, nested dicts of arrays.
    transformation: theta -> an optax transformation; theta may be traced and differentiated.
    """

    init: Callable[[Key], Tree]
    transformation: Callable[[Tree], optax.GradientTransformation]


class Stage(NamedTuple):
    """One fit: `steps` batches into `learner`. `enter(variables of the stage before (None at first), key) -> Variables` turns
    them into this learner's; None hands them on as they are. It does not run again on resume."""

    learner: Learner
    batches: Batches
    steps: int
    enter: Callable[[Variables | None, Key], Variables] | None = None


class Evaluation(NamedTuple):
    """An evaluator on a finite source of batches, every `every` steps and after the last one (0: only after the last)."""

    evaluator: Evaluator
    batches: Batches
    every: int


class Example(NamedTuple):
    """A small instance that the contract suite finds as `example()` beside a factory.

    member: the Task, Estimate, Learner or Evaluator.
    task: what an Estimate or an Evaluator runs on.
    batch: key -> batch; None draws one from the Specs (floats normal, integers 0 or 1, "mask" and "weight" ones).
    exact_gradient: False where the gradient is meant to differ from the loss's (straight-through, first order); `why` says why.
    """

    member: Any
    task: Task | None = None
    batch: Callable[[Key], Batch] | None = None
    exact_gradient: bool = True
    why: str = ""
