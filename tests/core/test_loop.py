"""fit and run: what a step sees, and that a run is a function of its key and its batches alone."""

from __future__ import annotations

import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.batches import from_function
from research.core.checkpoint import Checkpoints
from research.core.hooks import EarlyStopping, Hook, JsonLines
from research.core.loop import FINISHED, INTERRUPTED, fit, run, train
from research.core.mesh import make_layout
from research.core.nonfinite import NonFiniteError
from research.core.types import Evaluation, Evaluator, Stage
from tests.core import toy


class Recorder(Hook):
    def __init__(self, at=None, act=None):
        self.calls, self.logged, self.found = [], {}, {}
        self.at, self.act = at, act

    def start(self, step, steps, learner, stage=0):
        self.calls.append(("start", step))

    def step(self, step):
        if step == self.at:
            self.act()

    def log(self, step, metrics):
        self.logged[step] = metrics

    def evaluated(self, step, prefix, values):
        self.found[step, prefix] = values

    def end(self, step):
        self.calls.append(("end", step))

    def close(self):
        self.calls.append(("close",))


def counting_evaluation(every, length=3):
    """How many batches an evaluation has seen, and the mean of b."""
    evaluator = Evaluator(
        lambda: {"n": jnp.zeros(()), "b": jnp.zeros(())},
        lambda stats, v, batch, key: {"n": stats["n"] + 1, "b": stats["b"] + v["params"]["b"]},
        lambda stats: {"batches": float(stats["n"]), "b": float(stats["b"] / stats["n"])},
    )
    return Evaluation(evaluator, toy.batches(length), every)


def by_hand(steps):
    """The State after `steps` steps without the loop."""
    learner = toy.learner()
    k_init, k_run, _ = jax.random.split(toy.KEY, 3)
    state = jax.jit(learner.init)(k_init)
    step = jax.jit(learner.step)
    for i in range(steps):
        state, _ = step(state, toy.batch(i), jax.random.fold_in(k_run, i))
    return state


def test_fit_is_the_steps_in_order_with_the_keys_of_their_numbers():
    assert toy.same_bits(fit(toy.learner(), toy.batches(), 7, key=toy.KEY), by_hand(7))


def test_going_on_from_a_state_equals_going_straight_through():
    first = fit(toy.learner(), toy.batches(), 5, key=toy.KEY)
    both = fit(toy.learner(), toy.batches(), 12, key=toy.KEY, state=first)
    assert toy.same_bits(both, by_hand(12))


def test_the_caller_keeps_what_it_passed_in():
    first = fit(toy.learner(), toy.batches(), 2, key=toy.KEY)
    fit(toy.learner(), toy.batches(), 4, key=toy.KEY, state=first)
    assert not any(x.is_deleted() for x in jax.tree.leaves(first))
    variables = {"params": {"w": jnp.ones(3), "b": jnp.ones(())}, "state": {"seen": jnp.zeros((), jnp.int32)}, "frozen": {}}
    fit(toy.learner(), toy.batches(), 2, key=toy.KEY, variables=variables)
    assert not any(x.is_deleted() for x in jax.tree.leaves(variables))


@pytest.mark.parametrize("per_call", [1, 2, 5])
def test_several_steps_in_one_call_see_the_same_batches_and_keys(per_call):
    recorder = Recorder()
    state = fit(toy.learner(), toy.batches(), 13, key=toy.KEY, steps_per_call=per_call, log_every=10, hooks=[recorder])
    alone = Recorder()
    fit(toy.learner(), toy.batches(), 13, key=toy.KEY, log_every=10, hooks=[alone])
    assert int(state["step"]) == 13
    np.testing.assert_allclose(state["params"]["w"], by_hand(13)["params"]["w"], rtol=1e-5)
    assert {k: v["draw"] for k, v in recorder.logged.items()} == pytest.approx({k: v["draw"] for k, v in alone.logged.items()})


def test_a_period_that_is_no_multiple_of_steps_per_call_is_refused():
    with pytest.raises(ValueError, match="log_every=10 is not a multiple of steps_per_call=4"):
        fit(toy.learner(), toy.batches(), 8, key=toy.KEY, steps_per_call=4, log_every=10)


def test_metrics_are_means_over_the_steps_since_the_last_log():
    recorder = Recorder()
    fit(toy.learner(), toy.batches(), 5, key=toy.KEY, log_every=2, hooks=[recorder])
    _, k_run, _ = jax.random.split(toy.KEY, 3)
    draws = [float(jax.random.uniform(jax.random.fold_in(k_run, i))) for i in range(5)]
    assert sorted(recorder.logged) == [2, 4, 5]
    assert recorder.logged[4]["draw"] == pytest.approx(np.mean(draws[2:4]), rel=1e-6)
    assert recorder.logged[5]["draw"] == pytest.approx(draws[4], rel=1e-6)


def test_evaluations_run_when_due_and_after_the_last_step():
    recorder = Recorder()
    evaluations = {"val": counting_evaluation(2), "test": counting_evaluation(0, length=4)}
    outcome = train(toy.learner(), toy.batches(), 5, key=toy.KEY, evaluations=evaluations, hooks=[recorder])
    assert sorted(recorder.found) == [(2, "val"), (4, "val"), (5, "test"), (5, "val")]
    assert outcome.results["test/batches"] == 4
    assert outcome.results["val/b"] == pytest.approx(float(outcome.state["params"]["b"]), rel=1e-6)


def test_a_source_that_ends_early_is_named_with_its_step():
    with pytest.raises(ValueError, match="the batches ended after 3 of 8 steps"):
        fit(toy.learner(), toy.batches(3), 8, key=toy.KEY)


def test_what_the_source_raises_comes_out_and_hooks_are_closed():
    def batch(i):
        if i == 3:
            raise OSError("disk on fire")
        return toy.batch(i)

    recorder = Recorder()
    with pytest.raises(OSError, match="disk on fire"):
        fit(toy.learner(), from_function(batch), 8, key=toy.KEY, hooks=[recorder])
    assert recorder.calls[-1] == ("close",) and ("end", 3) not in recorder.calls
    assert not any(t.name == "prefetch" for t in threading.enumerate())


def test_a_batch_unlike_its_specs_is_refused_by_path():
    wrong = from_function(lambda i: {**toy.batch(i), "targets": np.zeros(5, np.float32)})
    with pytest.raises(ValueError, match="targets"):
        fit(toy.learner(), wrong, 2, key=toy.KEY)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_and_saves(signum, tmp_path):
    recorder = Recorder(at=4, act=lambda: os.kill(os.getpid(), signum))
    checkpoints = Checkpoints(tmp_path)
    before = signal.getsignal(signum)
    outcome = train(toy.learner(), toy.batches(), 50, key=toy.KEY, hooks=[recorder], checkpoints=checkpoints)
    checkpoints.close()
    assert outcome.reason == INTERRUPTED and 4 <= int(outcome.state["step"]) <= 5
    assert Checkpoints(tmp_path).latest().step == int(outcome.state["step"])
    assert signal.getsignal(signum) is before
    on = fit(toy.learner(), toy.batches(), 9, key=toy.KEY, state=outcome.state)
    assert toy.same_bits(on, by_hand(9))


def test_a_hook_that_stops_ends_the_run_and_what_is_measured_once_is_measured():
    class Stop(Hook):
        def stop(self, step):
            return "enough" if step >= 3 else None

    outcome = train(toy.learner(), toy.batches(), 9, key=toy.KEY, hooks=[Stop()], evaluations={"test": counting_evaluation(0)})
    assert (outcome.reason, int(outcome.state["step"])) == ("enough", 3)
    assert outcome.results["test/batches"] == 3


def test_a_loss_that_is_not_finite_names_its_step_and_its_cause():
    def batch(i):
        given = toy.batch(i)
        return {**given, "inputs": given["inputs"] * (np.inf if i == 6 else 1)}

    with pytest.raises(NonFiniteError, match=r"at step 6; on replay: (NaN|infinity) in the input inputs"):
        fit(toy.learner(), from_function(batch), 30, key=toy.KEY, log_every=10)
    with pytest.raises(NonFiniteError, match=r"at step 6$"):
        fit(toy.learner(), from_function(batch), 30, key=toy.KEY, log_every=10, replay=False)


def test_what_is_not_finite_is_not_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path, every=4)
    with pytest.raises(NonFiniteError):
        fit(toy.learner(rate=1e6), toy.batches(), 40, key=toy.KEY, checkpoints=checkpoints, log_every=40)
    checkpoints.close()
    saved = Checkpoints(tmp_path).latest()
    assert saved is None or np.isfinite(np.asarray(Checkpoints(tmp_path).load(saved)["params"]["w"])).all()


def test_a_failed_background_save_stops_the_run(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, every=2)

    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr("research.core.checkpoint.storage.write", refuse)
    with pytest.raises(Exception, match="no space left on the device"):
        fit(toy.learner(), toy.batches(), 40, key=toy.KEY, checkpoints=checkpoints)


def killed_at(at):
    """A hook that asks for an end at the `at`-th step taken."""
    return Recorder(at=at, act=lambda: os.kill(os.getpid(), signal.SIGTERM))


def seen_evaluation(every, sign):
    """A measure that rises with the examples seen, or falls."""
    evaluator = Evaluator(
        lambda: jnp.zeros((), jnp.int32),
        lambda stats, v, batch, key: sign * v["state"]["seen"],
        lambda stats: {"worth": float(stats)},
    )
    return Evaluation(evaluator, toy.batches(1), every)


@pytest.mark.parametrize(("at", "sign"), [(4, -1), (5, -1), (12, -1), (20, 1)])
def test_an_interruption_loses_no_measurement_that_later_steps_count_on(at, sign, tmp_path):
    """Early stopping, the best checkpoint and the results are those of a run that was not interrupted, wherever it was."""

    def trained(folder, *more):
        checkpoints = Checkpoints(folder, every=4, keep_latest=1, keep_best=1, best="val/worth", mode="max")
        lines = JsonLines(folder / "metrics.jsonl")
        early = EarlyStopping("val/worth", 2, "max", history=lines.path)
        stage = Stage(toy.learner(), toy.batches(), 20)
        evaluations = {"val": seen_evaluation(4, sign)}
        outcome = run([stage], key=toy.KEY, evaluations=evaluations, hooks=[lines, early, *more], checkpoints=checkpoints)
        checkpoints.close()
        return outcome, Checkpoints(folder, best="val/worth", mode="max", read_only=True).best()

    straight, best = trained(tmp_path / "straight")
    first, _ = trained(tmp_path / "cut", killed_at(at))
    assert first.reason == INTERRUPTED
    outcome, best_again = trained(tmp_path / "cut")
    assert outcome.results == straight.results
    assert int(straight.state["step"]) == (12 if sign < 0 else 20)
    assert toy.same_bits(outcome.state, straight.state)
    assert (best_again.step, best_again.metrics) == (best.step, best.metrics)
    again, _ = trained(tmp_path / "cut")
    assert int(again.state["step"]) == int(straight.state["step"])


def stages(first=4, second=6):
    """Two stages; the second begins from the first's variables, with w doubled."""

    def doubled(variables, key):
        return {**variables, "params": {**variables["params"], "w": 2 * variables["params"]["w"]}}

    return [
        Stage(toy.learner(), toy.batches(), first),
        Stage(toy.learner(rate=0.0), from_function(lambda i: toy.batch(i + 100), None, "second"), second, doubled),
    ]


def test_stages_hand_their_variables_on_through_enter():
    outcome = run(stages(), key=toy.KEY)
    first = fit(toy.learner(), toy.batches(), 4, key=jax.random.fold_in(toy.KEY, 0))
    assert outcome.reason == FINISHED
    np.testing.assert_array_equal(outcome.state["params"]["w"], 2 * first["params"]["w"])
    assert int(outcome.state["step"]) == 6


@pytest.mark.parametrize("at", [2, 4, 7])
def test_an_interrupted_run_goes_on_in_its_stage_without_entering_again(at, tmp_path):
    straight = run(stages(), key=toy.KEY).state
    count = [0]

    def maybe():
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), signal.SIGTERM)

    class Kill(Hook):
        def step(self, step):
            maybe()

    with_kill = Checkpoints(tmp_path)
    assert run(stages(), key=toy.KEY, checkpoints=with_kill, hooks=[Kill()]).reason == INTERRUPTED
    with_kill.close()
    again = Checkpoints(tmp_path)
    outcome = run(stages(), key=toy.KEY, checkpoints=again)
    again.close()
    assert outcome.reason == FINISHED and toy.same_bits(outcome.state, straight)


def test_a_resumed_run_refuses_other_batches(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    run(stages(), key=toy.KEY, checkpoints=checkpoints)
    checkpoints.close()
    other = [stages()[0], stages()[1]._replace(batches=from_function(toy.batch, None, "third"))]
    with pytest.raises(ValueError, match="its batches were second, now they are third"):
        run(other, key=toy.KEY, checkpoints=Checkpoints(tmp_path))


def test_an_early_stop_is_remembered_by_a_resumed_run(tmp_path):
    class Stop(Hook):
        def stop(self, step):
            return "enough" if step >= 3 else None

    checkpoints = Checkpoints(tmp_path)
    run(stages()[:1], key=toy.KEY, checkpoints=checkpoints, hooks=[Stop()])
    checkpoints.close()
    outcome = run(stages()[:1], key=toy.KEY, checkpoints=Checkpoints(tmp_path), evaluations={"test": counting_evaluation(0)})
    assert int(outcome.state["step"]) == 3 and outcome.results["test/batches"] == 3


@pytest.mark.parametrize("sizes", [{"data": 2}, {"data": 2, "fsdp": 2}])
def test_a_mesh_changes_nothing_but_where_arrays_are(sizes):
    layout = make_layout(sizes, {"batch": ("data", "fsdp")})
    with_mesh = fit(toy.learner(), toy.batches(), 6, key=toy.KEY, mesh=layout, steps_per_call=2, log_every=2)
    np.testing.assert_allclose(np.asarray(with_mesh["params"]["w"]), by_hand(6)["params"]["w"], rtol=1e-5)
    assert len(with_mesh["params"]["w"].sharding.device_set) == layout.mesh.size


def test_a_dimension_that_the_mesh_does_not_divide_is_named_before_anything_compiles():
    layout = make_layout({"fsdp": 2}, {"embed": ("fsdp",), "batch": ("fsdp",)})
    with pytest.raises(ValueError, match=r"state params/w \(3,\): dimension 0 \(embed\) of 3 is not divisible by mesh fsdp=2"):
        fit(toy.learner(), toy.batches(), 6, key=toy.KEY, mesh=layout)
