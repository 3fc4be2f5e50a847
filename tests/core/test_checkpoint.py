"""Checkpoints: what is saved comes back bit for bit, or it is said that it does not."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from research.core import files, storage
from research.core.checkpoint import CheckpointError, Checkpoints, state_sha256
from tests.core.states import Momentum, abstract, flip, names, rich_state, saved, small_state

ROOT = Path(__file__).parents[2]


def test_a_state_comes_back_bit_for_bit_with_its_containers_and_dtypes(tmp_path):
    state, checkpoints = rich_state(), Checkpoints(tmp_path)
    checkpoints.save(state)
    loaded = checkpoints.load(checkpoints.latest(), abstract(state))
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    assert [x.dtype for x in jax.tree.leaves(loaded)] == [x.dtype for x in jax.tree.leaves(state)]
    assert state_sha256(loaded) == state_sha256(state)
    assert isinstance(loaded["opt"][0], Momentum) and loaded["params"]["none"].shape == (0, 4)
    assert all(float(loaded["params"]["layers"][str(i)][0, 0]) == i for i in range(12))
    draw = jax.random.normal(state["memory"]["keys"][1], (3,))
    assert (jax.random.normal(loaded["memory"]["keys"][1], (3,)) == draw).all()


def test_names_with_dots_do_not_end_in_one_place(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(rich_state())
    held = checkpoints.load(checkpoints.latest())["state"]
    assert [float(x) for x in (held["a.b"], held["a"]["b"], held["a%2Eb"], held["c/d"])] == [1, 2, 3, 4]


def test_without_an_abstract_state_everything_comes_back_as_dicts_with_equal_hash(tmp_path):
    state, checkpoints = rich_state(), Checkpoints(tmp_path)
    checkpoints.save(state)
    loaded = checkpoints.load(checkpoints.latest())
    assert state_sha256(loaded) == state_sha256(state)
    assert loaded["opt"]["0"]["trace"]["w"].dtype == jnp.bfloat16
    assert loaded["params"]["empty"] == {} and jax.tree.structure(loaded["params"]) == jax.tree.structure(state["params"])
    checkpoints.save({"step": jnp.int32(4), "params": {}, "frozen": {}})
    assert {k: v for k, v in checkpoints.load(checkpoints.latest()).items() if k != "step"} == {"params": {}, "frozen": {}}


def test_state_sha256_sees_every_leaf_path_dtype_and_shape():
    state = rich_state()
    base = state_sha256(state)
    for path, _ in storage.trees.leaves_with_paths(state):
        changed = storage.trees.map_with_path(lambda p, x, path=path: _bumped(x) if p == path and x.size else x, state)
        size = dict(storage.trees.leaves_with_paths(state))[path].size
        assert (state_sha256(changed) != base) == bool(size), path
    zeros = jnp.zeros(4)
    others = [{"b": zeros}, {"a": jnp.zeros((2, 2))}, {"a": jnp.zeros(4, jnp.int32)}, {"a": zeros, "b": jnp.zeros(0)}]
    assert len({state_sha256(s) for s in ({"a": zeros}, *others)}) == 5
    assert state_sha256({"a": (jnp.ones(1), jnp.zeros(1))}) == state_sha256({"a": {"0": jnp.ones(1), "1": jnp.zeros(1)}})


def _bumped(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.fold_in(x, 1) if x.ndim == 0 else jax.vmap(lambda k: jax.random.fold_in(k, 1))(x)
    return ~x if x.dtype == bool else (x + jnp.ones((), x.dtype)).astype(x.dtype)


def test_a_state_donated_right_after_save_is_saved_as_it_was(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    for sharding in (jax.sharding.SingleDeviceSharding(jax.devices()[0]), NamedSharding(mesh, P("data"))):
        state = {"step": jnp.int32(1), "w": jnp.arange(800_000.0), "frozen": {"f": jnp.arange(80_000.0)}}
        state |= {"w": jax.device_put(state["w"], sharding), "frozen": jax.device_put(state["frozen"], sharding)}
        wanted, shape = state_sha256(state), abstract(state)
        overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
        overwrite(jax.tree.map(jnp.copy, state))
        checkpoints = Checkpoints(tmp_path / str(sharding.num_devices))
        checkpoints.save(state)
        new = overwrite(state)  # while the save is under way
        assert float(new["w"][5]) == -1
        assert state_sha256(checkpoints.load(checkpoints.latest(), shape)) == wanted


def test_saved_on_one_device_and_on_a_mesh_load_onto_the_shardings_asked_for(tmp_path):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    spread = NamedSharding(mesh, P("data", "tensor"))
    state = {"step": jnp.int32(1), "w": jnp.arange(64.0).reshape(8, 8), "frozen": {"f": jnp.arange(64.0).reshape(8, 8)}}
    on_mesh = {**state, "w": jax.device_put(state["w"], spread), "frozen": jax.device_put(state["frozen"], spread)}
    for name, given, wanted in (("a", state, on_mesh), ("b", on_mesh, state)):
        checkpoints = Checkpoints(tmp_path / name)
        checkpoints.save(given)
        shape = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted)
        loaded = checkpoints.load(checkpoints.latest(), shape)
        assert loaded["w"].sharding == wanted["w"].sharding
        assert loaded["frozen"]["f"].sharding == wanted["frozen"]["f"].sharding
        assert state_sha256(loaded) == state_sha256(state)


def test_a_save_asked_for_during_another_is_not_lost(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_latest=5)
    for step in range(5):
        checkpoints.save(small_state(step))
    checkpoints.close()
    assert {f"0-{step}" for step in range(5)} <= names(tmp_path)


def test_position_and_metrics_come_back_and_what_is_no_json_is_refused_at_once(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    position = {"batches": {"next_index": 7}, "fingerprint": "Ünïcode", "reason": ""}
    checkpoints.save(small_state(1), stage=2, position=position, metrics={"val/x": np.array([1.0, np.nan]), "y": np.float32(2)})
    found = checkpoints.latest()
    assert (found.stage, found.step, found.position) == (2, 1, position)
    assert found.metrics == {"val/x": [1.0, None], "y": 2.0}
    with pytest.raises(ValueError, match="no JSON value"):
        checkpoints.save(small_state(2), position={"batches": object()})


# What does not fit


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"w": jnp.zeros((4, 2), jnp.float16)}, r"params/w: saved float32\[4,2\], wanted float16\[4,2\]"),
        ({"w": jnp.zeros((4, 3))}, r"params/w: saved float32\[4,2\], wanted float32\[4,3\]"),
        ({"w": jnp.zeros((4, 2)), "v": jnp.zeros(1)}, r"params/v: saved nothing, wanted float32\[1\]"),
        ({}, r"params/w: saved float32\[4,2\], wanted nothing"),
    ],
)
def test_another_model_is_refused_by_the_first_path_that_differs(tmp_path, wanted, said):
    checkpoints = saved(tmp_path)
    with pytest.raises(CheckpointError, match=said) as caught:
        checkpoints.load(checkpoints.latest(), abstract({**small_state(0), "params": wanted}))
    assert "\n" not in str(caught.value)


def test_another_frozen_is_refused_too(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(rich_state())
    other = rich_state() | {"frozen": {"teacher": {"w": jnp.zeros((2, 3), jnp.bfloat16)}, "key": jax.random.key(0)}}
    with pytest.raises(CheckpointError, match="frozen/teacher/w: saved float32"):
        checkpoints.load(checkpoints.latest(), abstract(other))


# Damage

PARTS = [p.relative_to("/") for p in map(Path, (
    "/meta.json", "/manifest.json", "/state/_CHECKPOINT_METADATA", "/state/commit_success.txt", "/state/state/_METADATA",
    "/state/state/manifest.ocdbt", "/state/state/d/*", "/state/state/ocdbt.process_0/d/*",
))]  # fmt: skip


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    saved(directory).close()
    return directory


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["flipped", "truncated", "deleted"])
def test_each_damaged_file_is_named_and_the_checkpoint_before_is_used(two_saved, tmp_path, fault, caplog):
    for part in PARTS:
        directory = tmp_path / str(part).replace("/", "_")
        subprocess.run(["cp", "-r", two_saved, directory], check=True)
        (victim,) = list((directory / "0-2").glob(str(part)))[:1]
        if fault == "flipped":
            flip(victim)
        elif fault == "truncated":
            victim.write_bytes(victim.read_bytes()[:-2])
        else:
            victim.unlink()
        checkpoints = Checkpoints(directory)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = checkpoints.latest()
        assert found.step == 1, part
        (record,) = caplog.records
        line = record.getMessage()
        assert "\n" not in line and "0-2" in line
        if part.name != "manifest.json" or fault != "flipped":  # a flip there shows on whichever file it was about
            assert str(victim) in line
        assert names(directory) == {"0-1", "damaged-0-2"}
        loaded = checkpoints.load(found, abstract(small_state(0)))
        assert float(loaded["params"]["w"][0, 0]) == 1.0


@pytest.mark.faults
def test_load_refuses_a_bit_flipped_since_it_was_chosen(tmp_path):
    checkpoints = saved(tmp_path)
    found = checkpoints.latest()
    flip(next(found.path.glob("state/state/d/*")))
    with pytest.raises(CheckpointError, match="0-2 is damaged: .*state/state/d/"):
        checkpoints.load(found, abstract(small_state(0)))


@pytest.mark.faults
def test_none_intact_is_an_error_and_stays_one(tmp_path):
    saved(tmp_path).close()
    for directory in ("0-1", "0-2"):
        flip(next((tmp_path / directory).glob("state/state/d/*")))
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no checkpoint in .* is intact: damaged-0-1, damaged-0-2") as caught:
            Checkpoints(tmp_path).latest()
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError):
        Checkpoints(tmp_path, best="val/x").best()


def test_nothing_saved_is_none(tmp_path):
    checkpoints = Checkpoints(tmp_path / "never")
    assert checkpoints.latest() is None and checkpoints.best() is None
    assert not (tmp_path / "never").exists()


@pytest.mark.faults
def test_a_damaged_frozen_is_found_and_both_are_put_aside(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(small_state(1))
    checkpoints.save({**small_state(2), "frozen": {"t": jnp.arange(9.0)}})
    checkpoints.wait()
    flip(next((tmp_path / "frozen").glob("*/arrays/state/d/*")))
    assert checkpoints.latest().step == 1
    assert "frozen" in caplog.text and "damaged-0-2" in names(tmp_path)
    checkpoints.save({**small_state(3), "frozen": {"t": jnp.arange(9.0)}})
    assert checkpoints.latest().step == 3  # stored anew, not by reference to the damaged one


@pytest.mark.faults
def test_a_reader_renames_nothing(tmp_path, caplog):
    saved(tmp_path).close()
    flip(next((tmp_path / "0-2").glob("state/state/d/*")))
    (tmp_path / ".partial-0-3").mkdir()
    before = names(tmp_path)
    reader = Checkpoints(tmp_path, read_only=True)
    assert reader.latest().step == 1 and "0-2" in caplog.text
    assert names(tmp_path) == before
    with pytest.raises(CheckpointError, match="opened to be read"):
        reader.save(small_state(9))


# Which are kept


def kept(directory: Path) -> set[str]:
    return {name for name in names(directory) if name[0].isdigit()}


@pytest.mark.parametrize(("mode", "best"), [("min", 3), ("max", 2)])
def test_the_newest_and_the_best_are_kept(tmp_path, mode, best):
    values = {1: 5.0, 2: 9.0, 3: 1.0, 4: 4.0, 5: float("nan"), 6: None, 7: float("inf"), 8: 3.0}
    checkpoints = Checkpoints(tmp_path, keep_latest=2, keep_best=1, best="val/x", mode=mode)
    for step, value in values.items():
        checkpoints.save(small_state(step), metrics={} if value is None else {"val/x": value})
    checkpoints.wait()
    assert kept(tmp_path) == {"0-7", "0-8", f"0-{best}"}
    assert checkpoints.best().step == best and checkpoints.latest().step == 8


def test_nan_is_never_best_even_alone(tmp_path):
    checkpoints = Checkpoints(tmp_path, best="val/x")
    checkpoints.save(small_state(1), metrics={"val/x": float("nan")})
    assert checkpoints.best() is None and checkpoints.latest().step == 1
    checkpoints.save(small_state(2), metrics={"val/x": np.array([1.0, np.nan])})
    assert checkpoints.best() is None and checkpoints.latest().step == 2


def test_the_mean_over_members_decides_in_a_population(tmp_path):
    checkpoints = Checkpoints(tmp_path, best="val/x", keep_latest=1)
    for step, values in enumerate(([1.0, 9.0], [4.0, 4.0], [5.0, 5.0], [0.0, float("nan")], [1.0, float("-inf")]), 1):
        checkpoints.save(small_state(step), metrics={"val/x": np.asarray(values)})
    assert checkpoints.best().step == 2


def test_best_is_of_the_last_stage_that_has_the_metric(tmp_path):
    checkpoints = Checkpoints(tmp_path, best="val/x", keep_latest=3)
    checkpoints.save(small_state(9), stage=0, metrics={"val/x": 1.0})
    checkpoints.save(small_state(1), stage=1, metrics={"val/x": 2.0})
    checkpoints.save(small_state(2), stage=1)
    assert checkpoints.best()[:2] == (1, 1) and checkpoints.latest()[:2] == (1, 2)


@pytest.mark.faults
def test_the_next_best_is_used_where_the_best_is_damaged(tmp_path):
    checkpoints = Checkpoints(tmp_path, best="val/x", keep_best=2, keep_latest=1)
    for step in (1, 2, 3):
        checkpoints.save(small_state(step), metrics={"val/x": float(step)})
    checkpoints.wait()
    flip(next((tmp_path / "0-1").glob("state/state/d/*")))
    assert checkpoints.best().step == 2


def test_a_run_that_went_back_is_not_overtaken_by_its_abandoned_future(tmp_path):
    saved(tmp_path, steps=(10, 20, 30), keep_latest=3).close()
    checkpoints = Checkpoints(tmp_path, keep_latest=2)
    checkpoints.save(small_state(20, scale=7.0))
    found = checkpoints.latest()
    assert found.step == 20 and kept(tmp_path) == {"0-20", "0-30"}
    assert float(checkpoints.load(found)["params"]["w"][0, 0]) == 140.0
    once = Checkpoints(tmp_path, keep_latest=1)
    once.save(small_state(15))
    assert once.latest().step == 15 and kept(tmp_path) == {"0-15"}


def test_frozen_is_stored_once_a_content_and_dropped_with_its_last_user(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_latest=1)
    for step, teacher in enumerate((1.0, 1.0, 2.0), 1):
        checkpoints.save({**small_state(step), "frozen": {"t": jnp.full(1000, teacher)}})
        checkpoints.wait()
        assert len(list((tmp_path / "frozen").iterdir())) == 1
        assert float(checkpoints.load(checkpoints.latest())["frozen"]["t"][0]) == teacher
    written = {p.stat().st_mtime_ns for p in (tmp_path / "frozen").glob("*/manifest.json")}
    checkpoints.save({**small_state(4), "frozen": {"t": jnp.full(1000, 2.0)}})
    checkpoints.wait()
    assert {p.stat().st_mtime_ns for p in (tmp_path / "frozen").glob("*/manifest.json")} == written


@pytest.mark.parametrize("bad", [{"mode": "least"}, {"keep_latest": 0}, {"keep_best": -1}, {"every": -5}])
def test_options_that_make_no_sense_are_refused(tmp_path, bad):
    with pytest.raises(ValueError, match="allowed"):
        Checkpoints(tmp_path, **bad)


# Failures in the background


@pytest.mark.faults
@pytest.mark.parametrize("surfaces", ["poll", "save", "wait", "close", "latest"])
def test_a_failed_save_surfaces_at_the_next_call_and_leaves_nothing(tmp_path, monkeypatch, surfaces):
    checkpoints = saved(tmp_path, steps=(1,))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "seal", full)
    checkpoints.save(small_state(2))
    checkpoints._thread.join()
    with pytest.raises(CheckpointError, match=r"0-2 was not saved: no space left") as caught:
        getattr(checkpoints, surfaces)(*([small_state(3)] if surfaces == "save" else []))
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == {"0-1"}
    monkeypatch.undo()
    checkpoints.poll()  # said once
    checkpoints.save(small_state(3))
    assert checkpoints.latest().step == 3


def test_poll_is_cheap_and_quiet_while_a_save_is_under_way(tmp_path, monkeypatch):
    checkpoints, go = Checkpoints(tmp_path), threading.Event()
    seal = files.seal
    monkeypatch.setattr(files, "seal", lambda directory: (go.wait(10), seal(directory)))
    checkpoints.save(small_state(1))
    began = time.perf_counter()
    for _ in range(1000):
        checkpoints.poll()
    assert time.perf_counter() - began < 0.5 and not kept(tmp_path)
    go.set()
    checkpoints.close()
    assert kept(tmp_path) == {"0-1"}


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 3 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", path], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.mark.faults
def test_a_full_disk_is_said_with_the_path_and_the_checkpoint_before_stays(tiny_disk, caplog):
    checkpoints = saved(tiny_disk / "c", steps=(1,))
    big = {**small_state(2), "params": {"w": jnp.asarray(np.random.default_rng(0).normal(size=1_000_000))}}
    with pytest.raises(CheckpointError, match=r"disk/c/0-2 was not saved: no space left on the device") as caught:
        checkpoints.save(big)
        checkpoints.wait()
    assert "\n" not in str(caught.value) and "Traceback" not in caplog.text
    assert names(tiny_disk / "c") == {"0-1"}
    free = os.statvfs(tiny_disk).f_bavail * os.statvfs(tiny_disk).f_frsize
    (tiny_disk / "fill").write_bytes(b"0" * (free - 150_000))  # the State fits, its frozen part does not
    with pytest.raises(CheckpointError, match="no space left"):
        checkpoints.save({**small_state(3), "frozen": {"t": jnp.arange(50_000.0)}})
        checkpoints.wait()
    (tiny_disk / "fill").unlink()
    assert checkpoints.latest().step == 1
    checkpoints.save(small_state(4))
    assert checkpoints.latest().step == 4


@pytest.mark.faults
def test_many_arrays_that_find_the_disk_full_are_one_line_and_no_traceback(tiny_disk):
    """Most of them fail after the first has ended the save: by itself, each is a traceback from tensorstore or asyncio."""
    code = """
        import sys, pathlib, numpy
        from research.core import storage
        many = {f"a{i}": numpy.random.rand(500 + i, 50) for i in range(100)}
        for attempt in range(20):
            directory = pathlib.Path(sys.argv[1]) / str(attempt)
            try:
                storage.write(many, directory)()
            except Exception as error:
                print(storage.failure(error, directory))
        class Broken:
            def __del__(self):
                raise ValueError("no save's")
        Broken()
        """
    said = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), tiny_disk], capture_output=True, text=True, cwd=ROOT, check=True
    )
    lines = [f"{tiny_disk / str(attempt)} was not saved: no space left on the device" for attempt in range(20)]
    assert said.stdout.splitlines() == lines
    assert said.stderr.count("Traceback") == 1 and said.stderr.strip().endswith("ValueError: no save's"), said.stderr
