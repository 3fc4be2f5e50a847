"""The folder of a run, which explains itself.

config.json      the resolved config
versions.json    what ran it: Python, packages, CPU and devices, commit; the sha256 of what it read from other runs, such as a
                 learned optimizer's theta, under "read"; earlier starts that differed under "earlier"
metrics.jsonl    what was logged, one JSON object a line (research.core.hooks)
events/          the same for TensorBoard
checkpoints/     States (research.core.checkpoint)
report.html      curves, tables and samples on one page (research.core.report)
evaluations.jsonl  what `gnomon evaluate` measured later
summary.json     final metrics under the names they are logged with, steps, wall_seconds, state_sha256; written last, so
                 it is there exactly when the run is finished
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from research.core import files, processes
from research.core.checkpoint import CheckpointError, Checkpoints, Saved, state_sha256
from research.core.config import flat
from research.core.hooks import Series, read_series
from research.core.types import GROUPS, Learner, State, Variables

NEW, UNFINISHED, FINISHED = "new", "unfinished", "finished"
_LOCK = ".lock"
OVERFIT = "overfit_one_batch"  # in config.json of a run on its first batch alone, which is another run than the config's
_OURS = (
    "summary.json",
    "report.html",
    "evaluations.jsonl",
    "events",
    "checkpoints",
    "metrics.jsonl",
    "versions.json",
    "config.json",
)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def plain_config(config: Any) -> dict[str, Any]:
    """A ConfigDict or a mapping as the plain dict that config.json holds."""
    return files.plain(config.to_dict() if hasattr(config, "to_dict") else config)


# Sections of a config that say where a run takes place, not what it computes: it may go on elsewhere.
PLACES = ("mesh", "rules", "pipeline")


def differences(was: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """["model.width: was 192, given 256", …] of two plain configs, in order of key."""
    a, b = dict(flat(was)), dict(flat(given))

    def shown(side: Mapping[str, Any], key: str) -> str:
        return repr(side[key]) if key in side else "absent"

    return [
        f"{key}: was {shown(a, key)}, given {shown(b, key)}"
        for key in sorted({*a, *b})
        if (key in a) != (key in b) or a.get(key) != b.get(key)
    ]


def _git() -> dict[str, Any] | None:
    """Commit of the checkout that this very file is part of, and whether tracked files differ from it; None without git, or
    where the package is installed elsewhere."""

    def ask(*words: str) -> str:
        here = Path(__file__).resolve()
        return subprocess.run(["git", "-C", here.parent, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        ask("ls-files", "--error-unmatch", Path(__file__).name)
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu() -> dict[str, Any]:
    """Model and instruction sets where /proc tells them."""
    told: dict[str, str] = {}
    if (info := Path("/proc/cpuinfo")).exists():
        for line in info.read_text().splitlines():
            name, _, value = line.partition(":")
            told.setdefault(name.strip(), value.strip())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model = told.get("model name", platform.processor() or platform.machine())
    return {"model": model, "cores": cores, "flags": told.get("flags", told.get("Features", ""))}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def package_versions() -> dict[str, str | None]:
    """Of Python and of the packages whose version a run may depend on."""
    return {"python": platform.python_version(), **{package: _version(package) for package in _PACKAGES}}


def versions() -> dict[str, Any]:
    """What this process runs on, as versions.json holds it. Asks jax for its devices, so the backend is chosen by then."""
    kinds = [device.device_kind for device in jax.devices()]
    return {
        **package_versions(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "devices": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "backend": jax.default_backend(),
        "processes": jax.process_count(),
        "git": _git(),
        "command": sys.argv,
    }


def read_json(path: Path) -> Any:
    """What a file of a run holds. ValueError, naming it, where that is no JSON."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); restore it, or choose another workdir") from error


def _trained(path: Path) -> bool:
    """Whether the folder of a run holds anything that took training."""
    metrics = path / "metrics.jsonl"
    kept = any((path / name).exists() for name in ("checkpoints", "summary.json"))
    return kept or (metrics.exists() and metrics.stat().st_size > 0)


def _locked(path: Path) -> int:
    """A descriptor that holds the lock on `path` until it is closed. The kernel lets go when a process dies, in any way."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.read(lock, 20).decode() or "unknown"
        os.close(lock)
        raise ValueError(f"workdir {path.parent} is in use by process {owner}; allowed: one process at a time") from error
    return lock


class Workdir:
    """A folder that one run at a time may write. `create` judges it; nothing is made before `begin`. Of several processes of a
    run each calls every method, and process 0 alone looks and writes.

    path: absolute. status: NEW, UNFINISHED (a run that goes on) or FINISHED. changed: how the config differs from that of the
    run that goes on, as `differences` says it.
    As a context manager it releases the folder at the end, and removes one in which nothing was trained.
    """

    def __init__(self, path: Path, config: dict[str, Any], status: str, changed: list[str], overwrite: bool):
        self.path, self.config, self.status, self.changed = path, config, status, changed
        self._overwrite = overwrite
        self._lock: int | None = None
        self._made: list[Path] = []

    @classmethod
    def create(cls, path: str | Path, config: Any, resume: bool = False, overwrite: bool = False) -> Workdir:
        """The workdir of a run with this config (ConfigDict or mapping). Touches nothing.

        A new or empty folder is NEW, and so is a run of ours that had trained nothing yet. One with a run of the same config is
        UNFINISHED or FINISHED. One with another config's run is refused, unless `resume` (go on with it under this config) or
        `overwrite` (`begin` deletes the files of that run, and only those). Any other folder that is not empty is refused
        always, and so is one that another process is writing.
        Raises ValueError, one line.
        """
        path, given = Path(path).absolute(), plain_config(config)
        return cls(path, given, *processes.first("workdir", lambda: cls._judged(path, given, resume, overwrite)))

    @staticmethod
    def _judged(path: Path, given: dict[str, Any], resume: bool, overwrite: bool) -> tuple[str, list[str], bool]:
        """(status, changed, whether what is there is to be replaced)."""
        if resume and overwrite:
            raise ValueError(f"workdir {path}: resume and overwrite were both asked for; allowed: one of them")
        if path.exists() and not path.is_dir():
            raise ValueError(f"workdir {path} is a file; allowed: a new or empty folder, or one with a run")
        held = sorted(p.name for p in path.iterdir() if p.name != _LOCK) if path.exists() else []
        if (path / _LOCK).exists():
            os.close(_locked(path / _LOCK))
        if not held:
            return NEW, [], overwrite
        if "config.json" not in held:
            listed = ", ".join(held[:3]) + (", …" if len(held) > 3 else "")
            raise ValueError(f"workdir {path} holds no run but is not empty ({listed}); allowed: a new or empty folder")
        if overwrite or not _trained(path):
            return NEW, [], True
        changed = differences(read_json(path / "config.json"), given)
        other = [change for change in changed if change.split(".")[0] not in PLACES]
        if other and not resume:
            more = f" (and {len(other) - 1} more)" if len(other) > 1 else ""
            raise ValueError(
                f"workdir {path} holds a run of another config: {other[0]}{more}; "
                "allowed: --resume, --overwrite, another --workdir"
            )
        finished = not other and (path / "summary.json").exists()
        return FINISHED if finished else UNFINISHED, changed, overwrite

    def begin(self, read: Mapping[str, str] = MappingProxyType({})) -> None:
        """Makes the folder, locks it, and writes config.json and versions.json. To be called when everything else is ready.

        read: {key of the config: sha256} of what the run reads from other runs; in versions.json.

        Raises ValueError (one line) where another process writes here, or the folder cannot be made.
        """
        processes.first("workdir", lambda: self._begin(read))

    def _begin(self, read: Mapping[str, str]) -> None:
        try:
            self._made = [p for p in (self.path, *self.path.parents) if not p.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.path / _LOCK)
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, str(os.getpid()).encode(), 0)
            self._fill(read)
        except OSError as error:
            self.close()
            raise ValueError(f"workdir {self.path} cannot be written: {error.strerror} ({error.filename})") from error
        except BaseException:
            self.close()
            raise

    def _fill(self, read: Mapping[str, str]) -> None:
        if self.status == NEW and not self._overwrite and (self.path / "config.json").exists():
            self._made = []
            raise ValueError(f"workdir {self.path} has been taken by another process in the meantime; run the command again")
        gone = _OURS if self._overwrite else ("summary.json", "report.html") if self.status == UNFINISHED else ()
        for name in gone:
            entry = self.path / name
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
        self._write_versions(read)
        files.write_whole(self.path / "config.json", files.json_bytes(self.config))

    def _write_versions(self, read: Mapping[str, str]) -> None:
        path, now = self.path / "versions.json", versions() | ({"read": dict(read)} if read else {})
        before = read_json(path) if path.exists() else {}
        earlier = before.pop("earlier", [])
        if before and (before != files.plain(now) or self.changed):
            earlier = [*earlier, before | {"config_then": [change.replace(", given ", ", then ") for change in self.changed]}]
        files.write_whole(path, files.json_bytes(now | {"earlier": earlier}))

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events_path(self) -> Path:
        return self.path / "events"

    @property
    def checkpoints_path(self) -> Path:
        return self.path / "checkpoints"

    def summary(self) -> dict[str, Any] | None:
        """summary.json of a finished run, else None."""
        path = self.path / "summary.json"
        return read_json(path) if path.exists() else None

    def finish(self, results: Mapping[str, Any], state: State, seconds: float) -> dict[str, Any]:
        """Writes summary.json and returns what is in it. results: final metrics under their full names. seconds: wall time
        spent, restarts included. After it the run counts as finished, so it is the last thing that is written."""
        summary = {
            **results,
            "steps": int(state["step"]),
            "wall_seconds": round(seconds, 3),
            "state_sha256": state_sha256(state),
        }
        processes.first("summary", lambda: files.write_whole(self.path / "summary.json", files.json_bytes(summary)))
        return files.plain(summary)

    def close(self) -> None:
        """Releases the folder; removes it if this process made it and nothing was trained in it."""
        self._undo()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _undo(self) -> None:
        made, self._made = self._made, []
        if self.path in made and not _trained(self.path):
            shutil.rmtree(self.path, ignore_errors=True)
            for parent in made[1:]:
                if parent.exists() and not any(parent.iterdir()):
                    parent.rmdir()

    def __enter__(self) -> Workdir:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def config_of(path: str | Path) -> dict[str, Any]:
    """The config that the run in this folder was trained by. ValueError (one line) where there is no run."""
    file = Path(path) / "config.json"
    if not file.exists():
        raise ValueError(f"{path} holds no run: there is no config.json in it; allowed: the folder of a run")
    held = read_json(file)
    if not isinstance(held, dict):
        raise ValueError(f"{file} holds a {type(held).__name__}, no config; restore it, or choose another workdir")
    return {key: value for key, value in held.items() if key != OVERFIT}


class Run(NamedTuple):
    """A run read back, for notebooks.

    config: plain dict. variables, state: of the checkpoint `saved`; all None if there is none yet. metrics: {name: (steps [n],
    values [n] or [n, members])}. summary: None while the run is unfinished.
    """

    config: dict[str, Any]
    variables: Variables | None
    state: State | None
    metrics: Series
    summary: dict[str, Any] | None
    saved: Saved | None


def _loaded(
    checkpoints: Checkpoints, learner: Callable[[int], Learner] | None, best: str | None
) -> tuple[Saved | None, Learner | None, State | None]:
    """The checkpoint, the learner of its stage, its State."""
    while True:
        saved = checkpoints.latest() if best is None else checkpoints.best()
        if saved is None:
            return None, None, None
        owner = None if learner is None else learner(saved.stage)
        abstract = None if owner is None else jax.eval_shape(owner.init, jax.random.key(0))
        try:
            return saved, owner, checkpoints.load(saved, abstract)
        except CheckpointError:
            if saved.path.exists():  # else the run that is writing here has just put a newer one in its place
                raise


def load_run(
    workdir: str | Path, learner: Callable[[int], Learner] | None = None, best: str | None = None, mode: str = "min"
) -> Run:
    """A run's config, arrays and metrics; also while it is being written.

    learner: stage -> the Learner of that stage, whose `variables` are taken. Without it the State comes as nested dicts (tuples
        and NamedTuples too), and the variables are "params", "state" and "frozen" at its top: the trained ones, where a learner
        keeps an average beside them; None where there are no such.
    best: a metric such as "val/bits_per_byte", for the checkpoint that is best by it and `mode` ("min", "max"), not the newest.

    Raises ValueError (one line) where there is no run, no checkpoint is intact, or none has the metric.
    """
    path = Path(workdir).absolute()
    config = config_of(path)
    checkpoints = Checkpoints(path / "checkpoints", best=best, mode=mode, read_only=True)
    saved, owner, state = _loaded(checkpoints, learner, best)
    if saved is None and best is not None:
        raise ValueError(f"{path}: no checkpoint has the metric {best!r}")
    variables: Variables | None = None
    if owner is not None and state is not None:
        variables = owner.variables(state)
    elif state is not None and {*GROUPS} <= {*state}:
        variables = {group: state[group] for group in GROUPS}
    summary = read_json(path / "summary.json") if (path / "summary.json").exists() else None
    return Run(config, variables, state, read_series(path / "metrics.jsonl"), summary, saved)
