"""Checkpoints of a State: written in the background, there whole or not at all, and never believed without their hashes.

checkpoints/
  <stage>-<step>/   state/ (the arrays), meta.json (position, metrics, path, dtype and shape of every leaf),
                    manifest.json (size and sha256 of every file)
  frozen/<sha256>/  State["frozen"], once per content: arrays/, meta.json, manifest.json
  damaged-…         put aside because a file was not as it was written
  .…                unfinished, or on its way out: thrown away at the next start
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from research.core import files, processes, storage
from research.core.storage import CheckpointError, state_sha256
from research.core.types import State, Tree

__all__ = ["CheckpointError", "Checkpoints", "Saved", "state_sha256"]
logger = logging.getLogger(__name__)
_NAME = re.compile(r"\d+-\d+")
_PARTIAL, _REPLACED, _DELETED, _DAMAGED = ".partial-", ".replaced-", ".deleted-", "damaged-"


class Saved(NamedTuple):
    """A checkpoint on disk. position and metrics as `save` was given them, metrics that were NaN or infinite as None."""

    stage: int
    step: int
    position: Mapping[str, Any] | None
    metrics: Mapping[str, Any]
    path: Path


class _Entry(NamedTuple):
    """What meta.json says. `order` counts saves: after a run went back to an earlier step, the newest has not the highest."""

    saved: Saved
    order: int
    leaves: storage.Description
    frozen: str | None
    frozen_leaves: storage.Description


def _shared(name: str, find: Callable[[], Saved | None]) -> Saved | None:
    """What process 0 finds, in every process."""

    def found() -> list[Any] | None:
        saved = find()
        return None if saved is None else [*saved[:-1], str(saved.path)]

    told = processes.first(name, found, CheckpointError)
    return None if told is None else Saved(told[0], told[1], told[2], told[3], Path(told[4]))


class Checkpoints:
    """The checkpoints of one run.

    directory: made by the first save. every: steps between saves, for `fit` to keep (0: only at the end).
    keep_latest: how many of the newest are kept. best: the metric, such as "val/bits_per_byte", by whose `mode` ("min", "max")
        the `keep_best` best are kept whatever their age. A metric with a value a member counts by its mean; a save without
        the metric, or with NaN or an infinity in it, is never a best one.
    read_only: for a run that another process may be writing; nothing is renamed or cleaned.
    One run at a time writes (`research.core.workdir` holds the lock). Not for several threads. Of a run of several processes
    each one calls every method: all write and read arrays in the one folder; what else there is to do, process 0 does.
    """

    def __init__(
        self,
        directory: str | Path,
        every: int = 0,
        keep_latest: int = 2,
        keep_best: int = 1,
        best: str | None = None,
        mode: str = "min",
        read_only: bool = False,
    ):
        for name, value, least in (("every", every, 0), ("keep_latest", keep_latest, 1), ("keep_best", keep_best, 0)):
            if value < least:
                raise ValueError(f"checkpoints: {name}={value}; allowed: {least} or more")
        if mode not in ("min", "max"):
            raise ValueError(f"checkpoints: mode={mode!r}; allowed: 'min', 'max'")
        self.directory = Path(directory).absolute()
        self.every, self.keep_latest, self.keep_best, self.mode, self.read_only = every, keep_latest, keep_best, mode, read_only
        self.metric = best
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self._recovered = read_only

    def save(
        self,
        state: State,
        stage: int = 0,
        position: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Begins to save `state` as `<stage>-<step>`, after an earlier save has ended; one of the same name is replaced.

        The arrays have been copied when this returns: the caller may donate them at once. position is JSON-able; metrics are
        {name: float or NumPy array}.
        Raises CheckpointError where this save cannot begin or an earlier one failed, ValueError for what is no JSON.
        """
        if self.read_only:
            raise CheckpointError(f"{self.directory} was opened to be read; nothing can be saved there")
        self.wait()
        self._recover()
        step = int(state["step"])
        name = f"{stage}-{step}"
        frozen = {"frozen": state["frozen"]}
        rest = {group: tree for group, tree in state.items() if group != "frozen"}
        frozen_leaves = storage.describe(frozen)
        meta = {
            "stage": stage,
            "step": step,
            "position": position,
            "metrics": files.plain(metrics or {}),
            "leaves": storage.describe(rest),
            "frozen_leaves": frozen_leaves,
        }
        files.json_bytes(meta)  # what is no JSON is refused here, not in the background
        partial = self.directory / f"{_PARTIAL}{name}"

        def begin() -> None:
            self.directory.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()

        try:
            processes.first("begin", begin, CheckpointError)
            wait = processes.everywhere("write", lambda: storage.write(rest, partial / "state"))
            frozen_copy = storage.on_host(frozen) if jax.tree.leaves(frozen) else None
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise storage.failure(error, self.directory / name) from error
        self._thread = threading.Thread(target=self._finish, args=(partial, name, wait, meta, frozen_copy), name="checkpoint")
        self._thread.start()

    def _finish(self, partial: Path, name: str, wait: Callable[[], None], meta: dict[str, Any], frozen: Tree | None) -> None:
        try:
            processes.everywhere("written", wait)
            processes.first("place", lambda: self._place(partial, name, meta, frozen), CheckpointError)
        except BaseException as error:  # raised by the next poll, save, wait or close
            self._error = storage.failure(error, self.directory / name)
            self._error.__cause__ = error
            shutil.rmtree(partial, ignore_errors=True)

    def _place(self, partial: Path, name: str, meta: dict[str, Any], frozen: Tree | None) -> None:
        """What process 0 does alone, when all have written their parts."""
        meta["order"] = 1 + max((entry.order for entry in self._entries()), default=-1)
        meta["frozen"] = None if frozen is None else self._store_frozen(frozen, meta["frozen_leaves"])
        files.write_whole(partial / "meta.json", files.json_bytes(meta, indent=None))
        files.seal(partial)
        final, replaced = self.directory / name, self.directory / f"{_REPLACED}{name}"
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        files.sync_directory(self.directory)
        self._retain()

    def _store_frozen(self, frozen: Tree, leaves: storage.Description) -> str:
        digest = hashlib.sha256(files.json_bytes(leaves) + storage.state_sha256(frozen).encode()).hexdigest()
        final, partial = self.directory / "frozen" / digest, self.directory / f"{_PARTIAL}frozen"
        if not final.exists():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            storage.write(frozen, partial / "arrays", alone=True)()
            files.seal(partial)
            final.parent.mkdir(exist_ok=True)
            partial.rename(final)
            files.sync_directory(final.parent)
        return digest

    @property
    def saving(self) -> bool:
        """Whether a save is under way in the background."""
        return self._thread is not None and self._thread.is_alive()

    def poll(self) -> None:
        """Raises CheckpointError if a save in the background has failed; costs nothing."""
        if not self.saving:
            self.wait()

    def wait(self) -> None:
        """Until the save in the background, if any, is on disk. Raises CheckpointError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """As `wait`; the Checkpoints may be used again."""
        self.wait()

    def latest(self) -> Saved | None:
        """The newest intact checkpoint; None if none was ever completed.

        A damaged one is named in one line of warning and put aside, and the one before it is taken.
        Raises CheckpointError if some were written and none is intact.
        """
        self.wait()
        self._recover()
        return _shared("latest", self._latest)

    def _latest(self) -> Saved | None:
        found = self._first_intact(lambda entries: sorted(entries, key=lambda entry: -entry.order))
        damaged = [path.name for path in self._folders() if path.name.startswith(_DAMAGED) or _NAME.fullmatch(path.name)]
        if found is None and damaged:
            raise CheckpointError(f"no checkpoint in {self.directory} is intact: {', '.join(sorted(damaged))}")
        return found

    def best(self) -> Saved | None:
        """The best intact checkpoint of the last stage that has the metric; None if none has it. Otherwise as `latest`."""
        self.wait()
        self._recover()
        return _shared("best", self._best)

    def _best(self) -> Saved | None:
        found = self._first_intact(self._ranked)
        if found is None:
            self._latest()  # raises where nothing is intact
        return found

    def load(self, saved: Saved, abstract: Tree | None = None) -> State:
        """The State of `saved` as `abstract` has it (ShapeDtypeStructs, laid out on their shardings); as nested dicts of arrays
        on the first device where it is None. The hash of every file is checked first.

        Raises CheckpointError (one line) naming the damaged file, or the first path whose shape or dtype differs.
        """
        self.wait()
        entry = self._entry(saved.path)
        problem = processes.first("intact", lambda: entry if isinstance(entry, str) else self._damage(entry))
        if isinstance(entry, str) or problem is not None:
            raise CheckpointError(f"checkpoint {saved.path.name} is damaged: {problem}")
        where = f"checkpoint {saved.path}"
        rest = None if abstract is None else {group: tree for group, tree in abstract.items() if group != "frozen"}
        state = storage.read(saved.path / "state", entry.leaves, rest, where)
        if abstract is None or "frozen" in abstract:
            wanted = None if abstract is None else {"frozen": abstract["frozen"]}
            state |= storage.read(self._frozen(entry) / "arrays", entry.frozen_leaves, wanted, where)
        if not saved.path.exists() or (entry.frozen and not self._frozen(entry).exists()):
            raise CheckpointError(f"{where} was deleted by the run that writes there while it was read")
        return state

    def _folders(self) -> list[Path]:
        return list(self.directory.iterdir()) if self.directory.is_dir() else []

    def _frozen(self, entry: _Entry) -> Path:
        return self.directory / "frozen" / str(entry.frozen)

    def _recover(self) -> None:
        """Once, before anything is read or written: throws away what a killed process left unfinished."""
        if not self._recovered:
            processes.first("recover", self._clean, CheckpointError)
            self._recovered = True

    def _clean(self) -> None:
        for path in self._folders():
            if path.name.startswith(_REPLACED) and not (kept := self.directory / path.name.removeprefix(_REPLACED)).exists():
                path.rename(kept)
            elif path.name.startswith((_PARTIAL, _REPLACED, _DELETED)):
                shutil.rmtree(path)

    def _entry(self, path: Path) -> _Entry | str:
        """What is saved in `path`, or why that cannot be told."""
        try:
            meta = json.loads((path / "meta.json").read_bytes())
            saved = Saved(meta["stage"], meta["step"], meta["position"], meta["metrics"], path)
            return _Entry(saved, meta["order"], meta["leaves"], meta["frozen"], meta["frozen_leaves"])
        except FileNotFoundError:
            return f"{path / 'meta.json'} is missing"
        except (ValueError, KeyError, TypeError) as error:
            return f"{path / 'meta.json'} cannot be read ({type(error).__name__})"

    def _complete(self) -> set[Path]:
        return {path for path in self._folders() if _NAME.fullmatch(path.name)}

    def _entries(self) -> list[_Entry]:
        """Every complete checkpoint; one whose meta.json cannot be read is put aside."""
        while True:
            entries, listed = [], self._complete()
            for path in listed:
                entry = self._entry(path)
                if isinstance(entry, str):
                    self._put_aside(path, entry)
                else:
                    entries.append(entry)
            if not self.read_only or self._complete() == listed:  # a reader looks again until nothing moves under its eyes
                return entries

    def _damage(self, entry: _Entry) -> str | None:
        return files.damage(entry.saved.path) or (entry.frozen and files.damage(self._frozen(entry))) or None

    def _first_intact(self, ordered: Callable[[list[_Entry]], list[_Entry]]) -> Saved | None:
        while True:
            for entry in ordered(self._entries()):
                problem = self._damage(entry)
                if problem is None:
                    return entry.saved
                if self.read_only and not entry.saved.path.exists():
                    break  # the process that writes here has put a newer one in its place meanwhile: look again
                self._put_aside(entry.saved.path, problem)
                if entry.frozen and self._frozen(entry).exists() and files.damage(self._frozen(entry)):
                    self._put_aside(self._frozen(entry), problem)
            else:
                return None

    def _put_aside(self, path: Path, problem: str) -> None:
        if self.read_only:
            if path.exists():  # else the process that writes here has just deleted it
                logger.warning("checkpoint %s is damaged and not used: %s", path.name, problem)
            return
        aside = self.directory / f"{_DAMAGED}{path.name}"
        if aside.exists():
            shutil.rmtree(aside)
        path.rename(aside)
        logger.warning("checkpoint %s is damaged and put aside as %s: %s", path.name, aside.name, problem)

    def _score(self, entry: _Entry) -> float | None:
        """Less is better; None where the metric is missing or not finite."""
        if self.metric is None or entry.saved.metrics.get(self.metric) is None:
            return None
        value = float(np.mean(np.asarray(entry.saved.metrics[self.metric], np.float64)))
        return None if not math.isfinite(value) else value if self.mode == "min" else -value

    def _ranked(self, entries: list[_Entry]) -> list[_Entry]:
        """Best first, the newer of equals first, of the last stage that has the metric."""
        scored = [(score, -entry.order, entry) for entry in entries if (score := self._score(entry)) is not None]
        last = max((entry.saved.stage for *_, entry in scored), default=0)
        return [entry for *_, entry in sorted(scored, key=lambda s: s[:2]) if entry.saved.stage == last]

    def _retain(self) -> None:
        entries = self._entries()
        newest = sorted(entries, key=lambda entry: -entry.order)[: self.keep_latest]
        kept = {entry.saved.path for entry in newest + self._ranked(entries)[: self.keep_best]}
        frozen = {entry.frozen for entry in entries if entry.saved.path in kept}
        unused = [path for path in self.directory.glob("frozen/*") if path.name not in frozen]
        for path in [entry.saved.path for entry in entries if entry.saved.path not in kept] + unused:
            leaving = self.directory / f"{_DELETED}{path.name}"
            path.rename(leaving)
            shutil.rmtree(leaving)
        for path in self.directory.glob(f"{_REPLACED}*"):
            shutil.rmtree(path)
