"""Trees of arrays in a folder. Only this module knows orbax.

A tree is stored as nested dicts of str keys by path, whatever its containers, so NamedTuples, tuples and empty nodes come back
from the abstract tree that is asked for, and without one everything comes back as dicts. A description of it (path, dtype and
shape of every leaf) is kept apart by the caller and compared before anything is read: orbax by itself would hand out a saved
float32 as float16.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from research.core import processes
from research.core import tree as trees
from research.core.types import Array, State, Tree

# [{"path": [str, …], "dtype": str, "shape": [int, …]}]; "impl" too for typed keys, "empty" instead for a dict of nothing
Description = Sequence[dict[str, Any]]


def _told_otherwise(record: logging.LogRecord) -> bool:
    """What is logged of a failed save beside the exception that it raises, which is shown in one line: by orbax 200 lines of
    traceback, by asyncio a traceback for each further array that could not be written.
    """
    error = record.exc_info[1] if record.exc_info else None
    return "_SignalingThread.run() raised an exception" not in record.getMessage() and ".orbax-checkpoint-tmp" not in str(error)


def _raised_otherwise(args: sys.UnraisableHookArgs, before: Callable[[Any], Any] = sys.unraisablehook) -> None:
    """A failed save closes its event loop at the first array that could not be written, and tensorstore has Python print a
    traceback for each array whose write ends after that.
    """
    if args.object is not None or not isinstance(args.exc_value, RuntimeError) or "loop is closed" not in str(args.exc_value):
        before(args)


logging.getLogger("absl").addFilter(_told_otherwise)
logging.getLogger("asyncio").addFilter(_told_otherwise)
sys.unraisablehook = _raised_otherwise


class CheckpointError(ValueError):
    """A checkpoint that could not be written, read, or fitted to the State that is wanted; one line."""


def failure(error: BaseException, path: Path) -> CheckpointError:
    """One line for what went wrong while `path` was written; a full disk is said in those words."""
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
        return CheckpointError(f"{path} was not saved: no space left on the device")
    return CheckpointError(f"{path} was not saved: {type(error).__name__}: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:300]


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _by_path(tree: Tree) -> list[tuple[trees.Path, Any]]:
    """[(path, leaf)] sorted by path, so the containers do not matter; Python numbers become arrays."""
    leaves = [(path, x if hasattr(x, "dtype") else np.asarray(x)) for path, x in trees.leaves_with_paths(tree)]
    return sorted(leaves, key=lambda item: item[0])


def _data(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def describe(tree: Tree) -> list[dict[str, Any]]:
    """Path, dtype and shape of every leaf, in path order, and the paths of empty dicts; JSON-able."""

    def empty(x: Any) -> bool:
        return isinstance(x, dict) and not x

    leaves = [
        {"path": list(path), "dtype": str(x.dtype), "shape": list(x.shape)}
        | ({"impl": str(jax.random.key_impl(x))} if _is_key(x) else {})
        for path, x in _by_path(tree)
    ]
    nodes = trees.leaves_with_paths(tree, is_leaf=empty)
    return leaves + [{"path": list(path), "empty": True} for path, x in nodes if empty(x) and path]


def state_sha256(state: State) -> str:
    """SHA-256 (hex) over every leaf in path order: path, dtype, shape, bytes.

    Equal exactly where every leaf is equal bit for bit under the same path, whatever containers hold them. Where a State spans
    processes, each must ask for it.
    """
    digest = hashlib.sha256()
    for path, x in _by_path(state):
        digest.update(json.dumps([path, str(x.dtype), list(x.shape)]).encode())
        digest.update(processes.on_host(_data(x)).tobytes())
    return digest.hexdigest()


def on_host(tree: Tree) -> Tree:
    """NumPy copies that outlive the arrays they were taken from, which may then be donated. Typed keys as their data."""
    return jax.tree.map(lambda x: np.array(processes.on_host(_data(x)), copy=True), tree)


def _escaped(path: trees.Path) -> trees.Path:
    """Orbax joins names by dots: "a.b" and "a" / "b" would silently end in one place."""
    return tuple(name.replace("%", "%25").replace(".", "%2E") for name in path)


def _storable(tree: Tree, data: Callable[[Any], Any]) -> Tree:
    """Nested dicts of `data(leaf)`, without arrays of size zero: orbax refuses them, and they are made anew when read."""
    return trees.nested((_escaped(path), data(x)) for path, x in _by_path(tree) if x.size)


def _context(alone: bool = False) -> ocp.Context:
    """`alone`: process 0 writes by itself, while the others do something else."""
    context = ocp.Context()
    if alone and processes.count() > 1:
        context.multiprocessing.active_processes = {0}
        context.multiprocessing.barrier_sync_key_prefix = "alone"
    context.array.saving.use_compression = False  # float weights shrink by 8% and take three times as long
    return context


def write(tree: Tree, directory: Path, alone: bool = False) -> Callable[[], None]:
    """Begins to store the arrays of `tree` in `directory`, which must not exist, and returns what waits for the end of it and
    raises what went wrong. The arrays have been copied when this returns: they may be donated or changed at once.

    Every process writes its part, into one folder that all see; `alone`, process 0 writes what it has on the host.
    """
    storable = _storable(tree, _data)
    if not storable:
        return lambda: None
    with _context(alone):
        response = ocp.save_async(directory, storable)
    if response is None:
        raise CheckpointError(f"{directory} was not saved: orbax did not take the save")
    return response.result


def _shown(entry: dict[str, Any] | None) -> str:
    return "nothing" if entry is None else f"{entry['dtype']}[{','.join(map(str, entry['shape']))}]"


def difference(saved: Description, wanted: Tree) -> str | None:
    """The first path, in path order, at which what was saved is not what is wanted, and both sides; None where all agree."""
    here = {tuple(e["path"]): e for e in saved if "dtype" in e}
    there = {path: {"dtype": str(x.dtype), "shape": list(x.shape)} for path, x in _by_path(wanted)}
    for path in sorted({*here, *there}):
        a, b = _shown(here.get(path)), _shown(there.get(path))
        if a != b:
            return f"{trees.joined(path)}: saved {a}, wanted {b}"
    return None


def _wanted(leaf: Any) -> jax.ShapeDtypeStruct:
    """What orbax is asked for. A sharding that is not said is this process's first device: orbax would take the saved one."""
    data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)


def _abstract(saved: Description) -> Tree:
    def node(entry: dict[str, Any]) -> Any:
        if "empty" in entry:
            return {}
        if "impl" not in entry:
            return jax.ShapeDtypeStruct(tuple(entry["shape"]), jnp.dtype(entry["dtype"]))
        key = jax.eval_shape(lambda: jax.random.key(0, impl=entry["impl"]))
        return jax.ShapeDtypeStruct(tuple(entry["shape"]), key.dtype)

    return trees.nested((tuple(entry["path"]), node(entry)) for entry in saved)


def read(directory: Path, saved: Description, abstract: Tree | None, what: str) -> Tree:
    """The arrays of `directory` as `abstract` has them (ShapeDtypeStructs; onto their shardings, if any), or as nested dicts on
    this process's first device where it is None.

    Raises CheckpointError (one line, beginning with `what`) naming the first path at which shape or dtype differ, before
    anything is read, or saying what orbax could not read.
    """
    differs = None if abstract is None else difference(saved, abstract)
    if differs is not None:
        raise CheckpointError(f"{what} does not fit the State that is wanted at {differs}")
    abstract = _abstract(saved) if abstract is None else abstract
    asked = _storable(abstract, _wanted)
    try:
        with _context():
            loaded = ocp.load(directory, asked) if asked else {}
    except Exception as error:
        raise CheckpointError(f"{what} cannot be read: {type(error).__name__}: {_first_line(error)}") from error
    arrays = dict(trees.leaves_with_paths(loaded))
    impls = {tuple(entry["path"]): entry["impl"] for entry in saved if "impl" in entry}

    def leaf(path: trees.Path, like: Any) -> Array:
        wanted = _wanted(like)
        data = arrays[_escaped(path)] if wanted.size else jnp.zeros(wanted.shape, wanted.dtype, device=wanted.sharding)
        return jax.random.wrap_key_data(data, impl=impls[path]) if path in impls else data

    return trees.map_with_path(leaf, abstract)
