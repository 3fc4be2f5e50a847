"""The one loop. `fit` trains a Learner; `run` takes an experiment through its stages.

Set up, then, until the steps are done: draw, step, and at each boundary look at the metrics, evaluate, save. The loop knows no
model and no topic. Randomness is a key and a step: the step's key is `fold_in(key, step)`, so there is no generator to save.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from research.core import contracts, metrics, placement
from research.core.batches import calls, open_at, prefetched
from research.core.checkpoint import Checkpoints, Saved
from research.core.evaluate import evaluator_run
from research.core.halting import agreed
from research.core.hooks import Hook
from research.core.interrupts import interrupts
from research.core.mesh import Layout, entered
from research.core.nonfinite import Replay
from research.core.types import Batches, Evaluation, Key, Learner, Stage, State, Variables

FINISHED, INTERRUPTED = "finished", "interrupted"


class Outcome(NamedTuple):
    """How a fit ended: the State, and FINISHED, INTERRUPTED, or a hook's reason to stop."""

    state: State
    reason: str
    results: Mapping[str, Any]  # of the last evaluations, {"val/accuracy": value}


class Program(NamedTuple):
    """A learner, compiled for one device or for a mesh.

    init: (key, variables or None) -> State. step: (state, batches with a leading axis of steps, their number, key) -> (State,
    metrics stacked over steps), the state's buffers donated. put: host batches of one call, whole in every process, to the
    devices. abstract: the State to be, with its shardings.
    """

    init: Callable[[Key, Variables | None], State]
    step: Callable[[State, Any, int, Key], tuple[State, Any]]
    put: Callable[[Any], Any]
    abstract: State


def compiled(learner: Learner, layout: Layout | None) -> Program:
    """The Program of a learner; jit compiles each part when it is first called."""

    def steps(state, batches, length, key):
        def body(state, batch):
            return learner.step(state, batch, jax.random.fold_in(key, state["step"]))

        if length == 1:
            state, seen = body(state, jax.tree.map(lambda x: x[0], batches))
            return state, jax.tree.map(lambda x: jnp.asarray(x)[None], seen)
        return jax.lax.scan(body, state, batches, length)

    def begin(key, variables):
        return learner.init(key) if variables is None else learner.init(key, variables)

    abstract = jax.eval_shape(learner.init, jax.random.key(0))
    if layout is None:
        return Program(jax.jit(begin), jax.jit(steps, static_argnums=2, donate_argnums=0), jax.device_put, abstract)
    states, whole = layout.shardings(learner.axes, abstract, "state"), layout.replicated
    stacked = placement.stacked(layout.batch_shardings(learner.batch))
    return Program(
        jax.jit(begin, out_shardings=states),
        jax.jit(
            steps,
            static_argnums=2,
            donate_argnums=0,
            in_shardings=(states, stacked, whole),
            out_shardings=(states, whole),
        ),
        lambda batches: placement.onto(batches, stacked),
        jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, states),
    )


def owned(state: State, abstract: State) -> State:
    """A copy laid out as `abstract`: what is donated must alias nothing that the caller holds."""
    return jax.tree.map(lambda x, a: jnp.copy(jax.device_put(x, a.sharding) if a.sharding is not None else x), state, abstract)


def check_periods(
    steps: int, steps_per_call: int, log_every: int, checkpoint_every: int, evaluations: Mapping[str, Evaluation]
) -> None:
    """ValueError (one line) on a number of steps that is none, and on a period that is no multiple of steps_per_call."""
    periods = {"log_every": log_every, "checkpoint every": checkpoint_every}
    periods |= {f"evaluate every ({name})": e.every for name, e in evaluations.items()}
    for name, value in {"steps": steps, "steps_per_call": steps_per_call, **periods}.items():
        least = 1 if name in ("steps_per_call", "log_every") else 0
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value}; allowed: a whole number from {least}")
    for name, period in periods.items():
        if period % steps_per_call:
            raise ValueError(f"{name}={period} is not a multiple of steps_per_call={steps_per_call}")


def train(
    learner: Learner,
    batches: Batches,
    steps: int,
    *,
    key: Key,
    state: State | None = None,
    variables: Variables | None = None,
    place: Mapping[str, Any] | None = None,
    steps_per_call: int = 1,
    log_every: int = 100,
    evaluations: Mapping[str, Evaluation] | None = None,
    hooks: Sequence[Hook] = (),
    checkpoints: Checkpoints | None = None,
    mesh: Layout | None = None,
    replay: bool = True,
    stage: int = 0,
) -> Outcome:
    """`fit`, telling how it ended. `place`: what was saved beside `state`, as `where` gives it. `stage`: the number that
    checkpoints carry."""
    evaluations = dict(evaluations or {})
    check_periods(steps, steps_per_call, log_every, checkpoints.every if checkpoints else 0, evaluations)
    contracts.check_learner(learner)
    k_init, k_run, k_eval = jax.random.split(key, 3)

    with entered(mesh), interrupts() as interrupted, contextlib.ExitStack() as closing:
        program = compiled(learner, mesh)
        variables = placement.replicated(variables, mesh)
        state = owned(program.init(k_init, variables) if state is None else state, program.abstract)
        results: dict[str, Any] = {}
        halting = agreed(interrupted)
        step, seen, stop = int(state["step"]), [], None
        measured = {name: evaluator_run(e, mesh) for name, e in evaluations.items()}
        guard = Replay(learner, k_run, replay)
        guard.anchor(state)

        share = placement.share_of(batches, learner.batch, mesh, program.put)

        def put(stacked):
            contracts.check_batch(stacked, share.specs, batches.fingerprint, leading=1)
            return share.put(stacked)

        def evaluate(names, state):
            fresh: dict[str, Any] = {}
            for name in names:
                for hook in hooks:
                    hook.evaluating(step, name)
                values = measured[name](learner.variables(state), jax.random.fold_in(k_eval, step))
                fresh |= {f"{name}/{k}": v for k, v in values.items()}
                for hook in hooks:
                    hook.evaluated(step, name, values)
            return fresh

        def save(checkpoints, state, position, reason, fresh):
            beside = {"batches": position, "fingerprint": batches.fingerprint, "reason": reason}
            checkpoints.save(state, stage=stage, position=beside, metrics=fresh)
            for hook in hooks:
                hook.saved(step)

        drawn = prefetched(calls(open_at(share.batches, step, place and place["batches"]), step, steps, steps_per_call, put))
        closing.callback(drawn.close)
        for hook in hooks:
            closing.callback(hook.close)
            hook.start(step, steps, learner, stage)
        if step >= steps:  # trained before, but perhaps not measured
            results |= evaluate(evaluations, state)
            if checkpoints and place:
                save(checkpoints, state, place["batches"], place["reason"], results)

        for call in drawn:
            state, new = program.step(state, call.batches, call.length, k_run)
            placement.settled(new, mesh)
            step += call.length
            guard.keep(call.batches, call.length)
            seen.append(new)
            if checkpoints:
                checkpoints.poll()
            for hook in hooks:
                hook.step(step)

            last = step == steps
            due = [name for name, e in evaluations.items() if last or (e.every and step % e.every == 0)]
            saving = checkpoints and (last or (checkpoints.every and step % checkpoints.every == 0))
            halt = halting()
            if last or step % log_every == 0 or due or saving or halt:
                host = metrics.stack_on_host(seen)
                guard.check(host, step)  # before anything is evaluated, saved or called best
                guard.anchor(state)
                seen = []
                for hook in hooks:
                    hook.log(step, metrics.averaged(host))
            # Asked to halt, it still measures what a later step would count on (best, early stopping), but leaves the last,
            # long measurements to the run that goes on.
            fresh = {} if halt and last else evaluate(due, state)
            early = next((reason for h in hooks if (reason := h.stop(step))), None)
            stop = INTERRUPTED if halt else early
            if early and not halt:  # stopped early for good: what is measured once at the end is measured now
                fresh |= evaluate([name for name in evaluations if name not in due], state)
            results |= fresh
            if checkpoints and (saving or stop):
                save(checkpoints, state, call.position, early or stop or "", fresh)
            if stop:
                break
        for hook in hooks:
            hook.end(step)
        return Outcome(state, stop or FINISHED, results)


def fit(learner: Learner, batches: Batches, steps: int, *, key: Key, **options: Any) -> State:
    """Trains until `steps` batches have been taken, and returns the State.

    learner: what to train. batches: where its batches come from. key: a typed key; the run is a function of it and the batches.
    Options, all of `train`: state (go on from it; `steps` counts its steps too), variables (start from them), steps_per_call
    (steps in one compiled call; other periods are its multiples), log_every, evaluations {prefix: Evaluation}, hooks,
    checkpoints, mesh (a `core.mesh.Layout`), replay (keep a copy of the State, to explain a NaN by).

    Ctrl-C and SIGTERM end it after the step at hand: it saves, and returns the State, from which another `fit` goes on.
    Raises ValueError on a learner, batch or period that cannot work, NonFiniteError where the loss is not finite, and whatever
    a background save failed with.
    """
    return train(learner, batches, steps, key=key, **options).state


def run(stages: Sequence[Stage], *, key: Key, checkpoints: Checkpoints | None = None, **options: Any) -> Outcome:
    """The stages in order, each with the key `fold_in(key, index)`, each begun from the variables of the one before.

    With `checkpoints` it goes on from the newest intact one: that stage is resumed at its batch, and its `enter` does not run
    again. Other options are those of `train`; evaluations, and the end of the outcome, are the last stage's.
    """
    evaluations = options.pop("evaluations", None)
    saved = checkpoints.latest() if checkpoints else None
    variables, outcome = None, None
    for index, (learner, batches, steps, enter) in enumerate(stages):
        k_stage = jax.random.fold_in(key, index)
        state = place = None
        if saved and index < saved.stage:
            continue
        if saved and checkpoints and index == saved.stage:
            state, place = resumed(saved, checkpoints, learner, batches, options.get("mesh"))
            if ended_early(saved):
                steps = int(state["step"])
        elif enter is not None:
            variables = enter(variables, jax.random.fold_in(k_stage, 2**31 - 1))
        final = index == len(stages) - 1
        outcome = train(
            learner, batches, steps, key=k_stage, state=state, variables=variables, place=place, stage=index,
            checkpoints=checkpoints, evaluations=evaluations if final else None, **options,
        )  # fmt: skip
        if outcome.reason == INTERRUPTED:
            return outcome
        variables = learner.variables(outcome.state)
    if outcome is None:
        raise ValueError("no stage to run")
    return outcome


def ended_early(saved: Saved) -> bool:
    """Whether this checkpoint closed its stage before its steps were done, by a hook's decision."""
    return where(saved)["reason"] not in ("", INTERRUPTED)


def where(saved: Saved) -> Mapping[str, Any]:
    """What `train` saved beside a State: {"batches": iterator state, "fingerprint", "reason"}."""
    if saved.position is None:
        raise ValueError(f"{saved.path} was not saved by a run: it has no position")
    return saved.position


def resumed(
    saved: Saved, checkpoints: Checkpoints, learner: Learner, batches: Batches, mesh: Layout | None
) -> tuple[State, Mapping[str, Any]]:
    """(state, what was saved beside it) from a checkpoint. ValueError where the batches are not those it was saved with."""
    place = where(saved)
    if place["fingerprint"] != batches.fingerprint:
        raise ValueError(f"{saved.path}: its batches were {place['fingerprint']}, now they are {batches.fingerprint}")
    with entered(mesh):
        return checkpoints.load(saved, compiled(learner, mesh).abstract), place
