"""Metrics are logged once, durably, and a run that goes on takes up where it was."""

from __future__ import annotations

import json
import os
import subprocess

import numpy as np
import pytest

from research.core import files
from research.core.hooks import EarlyStopping, Hook, JsonLines, read_lines, read_series


def steps_of(path):
    return [line["step"] for line in read_lines(path)]


def logged(path, upto, start=0, every=10, stage=0, prefix="val"):
    """Logs and evaluates as fit does, and returns the hook as a killed process leaves it: not closed."""
    hook = JsonLines(path)
    hook.start(start, 100, None, stage)
    for step in range(start + every, upto + 1, every):
        hook.log(step, {"loss": 1.0 / step})
        hook.evaluated(step, prefix, {"x": float(step)})
    return hook


def test_every_method_of_a_hook_does_nothing():
    hook = Hook()
    hook.start(0, 10, None)
    hook.step(1)
    hook.log(1, {"loss": 1.0})
    hook.evaluated(1, "val", {"x": 1.0})
    hook.saved(1)
    assert hook.stop(1) is None
    hook.end(1)
    hook.close()


def test_lines_are_json_with_step_time_and_full_names(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    hook = JsonLines(path)
    hook.start(0, 10, None)
    image = np.zeros((4, 4, 3), np.uint8)
    hook.log(5, {"loss": float("nan"), "members": np.array([1.0, np.inf])})
    hook.evaluated(5, "val", {"confusion": np.eye(2), "sample": "text\n", "picture": image})
    first, second = (json.loads(text, parse_constant=pytest.fail) for text in path.read_text().splitlines())
    assert first["train/loss"] is None and first["train/members"] == [1.0, None]
    assert (
        second["val/confusion"] == [[1.0, 0.0], [0.0, 1.0]] and second["val/sample"] == "text\n" and "val/picture" not in second
    )
    assert first["step"] == 5 and first["stage"] == 0 and first["time"] > 1.7e9 and 0 <= first["seconds"] < 60


def test_a_line_is_in_the_file_when_the_call_returns(tmp_path):
    path = tmp_path / "m.jsonl"
    logged(path, 20)  # never closed
    assert steps_of(path) == [10, 10, 20, 20]


def test_a_run_that_goes_on_drops_what_came_after_and_says_nothing_twice(tmp_path):
    path, straight = tmp_path / "m.jsonl", tmp_path / "straight.jsonl"
    logged(path, 50)
    logged(path, 80, start=30)
    logged(straight, 80)

    def content(p):
        return [{k: v for k, v in line.items() if k not in ("time", "seconds")} for line in read_lines(p)]

    assert content(path) == content(straight)


def test_a_line_cut_off_by_a_kill_is_dropped_and_the_rest_kept(tmp_path):
    path = tmp_path / "m.jsonl"
    logged(path, 30)
    path.write_bytes(path.read_bytes()[:-7])
    assert steps_of(path) == [10, 10, 20, 20, 30]
    logged(path, 40, start=30)
    assert steps_of(path) == [10, 10, 20, 20, 30, 40, 40]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "m.jsonl"
    logged(path, 30)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"garbage\n", *lines[2:]]))
    with pytest.raises(ValueError, match=r"m\.jsonl, line 3, is no line of metrics: 'garbage'"):
        JsonLines(path).start(0, 10, None)


def test_a_kill_while_lines_are_dropped_loses_none(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    logged(path, 50)
    before = path.read_bytes()

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        JsonLines(path).start(30, 100, None)
    assert path.read_bytes() == before


def test_stages_keep_their_own_steps(tmp_path):
    path = tmp_path / "m.jsonl"
    logged(path, 30)
    logged(path, 20, stage=1)
    assert [(line["stage"], line["step"]) for line in read_lines(path)][::2] == [(0, 10), (0, 20), (0, 30), (1, 10), (1, 20)]
    assert read_series(path)["val/x"][0].tolist() == [10, 20, 30, 40, 50]
    logged(path, 10, start=0, stage=1)  # stage 1 again from its beginning
    assert [(line["stage"], line["step"]) for line in read_lines(path)][::2] == [(0, 10), (0, 20), (0, 30), (1, 10)]


def test_seconds_add_up_over_restarts(tmp_path):
    path = tmp_path / "m.jsonl"
    lines = [{"stage": 0, "step": s, "time": 1.0, "seconds": 100.0 * s, "train/loss": 1.0} for s in (1, 2, 3)]
    path.write_bytes(b"".join(files.json_bytes(line, indent=None) for line in lines))
    hook = JsonLines(path)
    hook.start(2, 10, None)
    assert 300 <= hook.seconds < 310  # the third was spent, though it is done again
    hook.log(3, {"loss": 1.0})
    assert 300 <= read_lines(path)[-1]["seconds"] < 310
    hook.close()
    kept = hook.seconds
    assert kept == hook.seconds >= 300


def test_series_are_arrays_with_nan_for_null_and_rows_for_members(tmp_path):
    path = tmp_path / "m.jsonl"
    hook = JsonLines(path)
    hook.start(0, 10, None)
    hook.log(1, {"loss": float("nan"), "each": np.array([1.0, 2.0])})
    hook.log(2, {"loss": 0.5, "each": np.array([3.0, np.nan])})
    hook.evaluated(2, "val", {"text": "no number"})
    series = read_series(path)
    assert set(series) == {"train/loss", "train/each"}
    steps, values = series["train/loss"]
    assert steps.tolist() == [1, 2] and np.isnan(values[0]) and values[1] == 0.5
    assert series["train/each"][1].shape == (2, 2) and np.isnan(series["train/each"][1][1, 1])
    assert read_series(tmp_path / "none.jsonl") == {}


@pytest.mark.faults
def test_a_full_disk_names_the_file_and_leaves_whole_lines(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        hook = JsonLines(disk / "m.jsonl")
        hook.start(0, 10**6, None)
        with pytest.raises(OSError, match="No space left on device: .*m.jsonl"):
            for step in range(10**5):
                hook.log(step, {"loss": 1.0, "note": "x" * 500})
        hook.close()
        assert (disk / "m.jsonl").read_bytes().endswith(b"}\n")
        assert steps_of(disk / "m.jsonl") == list(range(len(steps_of(disk / "m.jsonl"))))
    finally:
        subprocess.run(["umount", disk], check=True)


def evaluate(hook, values, start=0):
    """Steps at which the hook asks to stop."""
    for step, value in enumerate(values, start + 1):
        hook.evaluated(step, "val", {"x": value})
        if hook.stop(step):
            return step
    return None


@pytest.mark.parametrize(
    ("mode", "values", "stops"),
    [
        ("min", [5.0, 4.0, 4.5, 4.4, 3.0, 3.5, 3.4, 3.3], 8),
        ("max", [1.0, 2.0, 1.5, 1.0, 1.9, 3.0], 5),
        ("min", [5.0, float("nan"), float("nan"), float("nan")], 4),
        ("min", [float("nan"), 5.0, 6.0, 4.0, 6.0, 6.0], None),
    ],
)
def test_early_stopping_waits_for_patience(mode, values, stops):
    hook = EarlyStopping("val/x", patience=3, mode=mode)
    hook.start(0, 100, None)
    assert evaluate(hook, values) == stops


def test_the_reason_names_metric_and_best():
    hook = EarlyStopping("val/x", patience=1, mode="max")
    hook.start(0, 100, None)
    evaluate(hook, [0.5, 0.9, 0.7])
    assert hook.stop(3) == "val/x has not improved for 1 evaluations (best 0.9 at step 2)"


@pytest.mark.parametrize("cut", range(1, 8))
def test_early_stopping_stops_at_the_same_step_after_a_restart(tmp_path, cut):
    values = [5.0, 4.0, 4.5, 4.4, 3.0, 3.5, 3.4, 3.3, 1.0]
    path = tmp_path / "m.jsonl"
    record, hook = JsonLines(path), EarlyStopping("val/x", patience=3, history=path)
    for h in (record, hook):
        h.start(0, 100, None)
        for step, value in enumerate(values[: min(cut + 2, 7)], 1):  # two evaluations further than the checkpoint
            h.evaluated(step, "val", {"x": value})
    record, hook = JsonLines(path), EarlyStopping("val/x", patience=3, history=path)
    hook.start(cut, 100, None)  # in whatever order the hooks come
    record.start(cut, 100, None)
    assert evaluate(hook, values[cut:], start=cut) == 8


def test_early_stopping_begins_anew_with_each_stage(tmp_path):
    path = tmp_path / "m.jsonl"
    record = JsonLines(path)
    record.start(0, 100, None)
    for step in (1, 2, 3):
        record.evaluated(step, "val", {"x": 0.0})
    hook = EarlyStopping("val/x", patience=2, history=path)
    hook.start(5, 100, None, stage=1)
    assert evaluate(hook, [5.0, 6.0, 7.0]) == 3


def test_a_metric_that_is_not_measured_is_named_with_the_nearest():
    hook = EarlyStopping("val/bits_per_bite", patience=1)
    hook.start(0, 1, None)
    hook.evaluated(1, "test", {})  # another evaluation
    with pytest.raises(ValueError, match="val/bits_per_bite.*not measured.*nearest: 'val/bits_per_byte'"):
        hook.evaluated(1, "val", {"bits_per_byte": 1.0, "nll": 2.0})


@pytest.mark.parametrize("bad", [{"mode": "least"}, {"patience": 0}, {"metric": "loss"}])
def test_early_stopping_that_makes_no_sense_is_refused(bad):
    with pytest.raises(ValueError, match="early stopping: .*allowed"):
        EarlyStopping(**({"metric": "val/x", "patience": 1} | bad))
