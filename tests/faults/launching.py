"""Starting runs of several processes, and finding one of them, or what it wrote, to do harm to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from research.core import processes

REPO = Path(__file__).resolve().parents[2]
TOY = "tests/faults/toy_run.py"
HEARTBEAT = 5


class Launched:
    """`gnomon launch` of the toy run, begun; what it has printed so far is in `log`."""

    def __init__(
        self,
        workdir: Path,
        count: int = 2,
        *words: str,
        devices: int = 1,
        restarts: int = 0,
        config: str = TOY,
        log: Path | None = None,
    ):
        self.workdir, self.log = workdir, log or workdir.with_suffix(f".{time.monotonic_ns()}.log")
        kept = {
            "JAX_COMPILATION_CACHE_DIR": str(self.log.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        options = ["--processes", count, "--devices", devices, "--heartbeat", HEARTBEAT, "--restarts", restarts]
        train = ["train", "--config", config, "--workdir", workdir, *words]
        command = [sys.executable, "-m", "research", "launch", *options, "--", *train]
        with open(self.log, "w") as out:
            self.process = subprocess.Popen([*map(str, command)], cwd=REPO, env={**os.environ, **kept}, stdout=out, stderr=out)

    def said(self) -> str:
        return self.log.read_text()

    def ended(self, within: float = 120) -> tuple[int, str]:
        """(exit code, what was printed)."""
        return self.process.wait(within), self.said()

    def finished(self) -> dict:
        """The summary, when it has come to its end."""
        code, said = self.ended()
        assert code == 0, said
        return json.loads((self.workdir / "summary.json").read_text())

    def pid(self, index: int) -> int:
        """The process of that number."""
        for entry in Path("/proc").iterdir():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1]) if entry.name.isdigit() else 0
                if parent == self.process.pid and f"{processes.INDEX}={index}\0" in (entry / "environ").read_text():
                    return int(entry.name)
            except OSError:
                continue
        raise LookupError(f"no process {index}: {self.said()}")

    def when(self, moment: Callable[[Path], bool]) -> None:
        """Waits for it."""
        while not moment(self.workdir):
            assert self.process.poll() is None, self.said()
            time.sleep(0.005)


def saved(number: int) -> Callable[[Path], bool]:
    """Whether the newest checkpoint in place is of that step or a later one."""
    return lambda workdir: any(int(p.name.split("-")[1]) >= number for p in (workdir / "checkpoints").glob("0-*"))


def saving(workdir: Path) -> bool:
    """Whether a checkpoint is being written, after a first one."""
    return saved(1)(workdir) and any((workdir / "checkpoints").glob(".partial-0-*"))


def damage(path: Path, how: str) -> Path:
    """Damages the largest file of a checkpoint: "truncated", "deleted" or "flipped", by one bit."""
    file = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = file.read_bytes()
    if how == "deleted":
        file.unlink()
    else:
        changed = content[: len(content) // 2] if how == "truncated" else content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
        file.write_bytes(changed)
    return file
