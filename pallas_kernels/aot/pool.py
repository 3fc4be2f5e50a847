"""Starts the processes that compile, hands them jobs, and tells a crash or a hang as a row of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pallas_kernels.aot import cuda, results, tpu
from pallas_kernels.aot.targets import Target

ROOT = Path(__file__).resolve().parents[2]
COMPILERS = {"tpu": tpu, "gpu": cuda}
STARTING = 120  # seconds in which a compiler must be loaded
VENVS = {"tpu": ".venv-tpu", "gpu": ".venv-cuda"}


class WorkerError(Exception):
    """A process that compiles ended, or did not answer; the message says why in one line."""


def python(implementation: str) -> Path:
    """The interpreter that has the compiler. Raises WorkerError where that environment is not there."""
    found = ROOT / VENVS[implementation] / "bin" / "python"
    if not found.exists():
        raise WorkerError(f"there is no {VENVS[implementation]}: make {VENVS[implementation]}")
    return found


class Worker:
    """The process of one target. It is started with the first job, and anew after a crash."""

    def __init__(self, target: Target, timeout: float):
        self.target, self.timeout = target, timeout
        self.process: subprocess.Popen[str] | None = None
        self.versions: dict[str, str] = {}
        self.never_ready: str | None = None  # why it cannot be started; it is not tried again

    def start(self) -> None:
        if self.never_ready is not None:
            raise WorkerError(self.never_ready)
        self.folder = tempfile.TemporaryDirectory(prefix="aot-")
        folder = Path(self.folder.name)
        if " " in str(folder):
            raise WorkerError(f"the compilers' options cannot name a folder with a space, such as {folder}: set TMPDIR")
        (folder / "dump").mkdir()
        self.log = folder / "log"
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("JAX_COMPILATION_CACHE")},
            **COMPILERS[self.target.implementation].environment(folder / "dump"),
            "JAX_ENABLE_COMPILATION_CACHE": "false",  # what comes from a cache is not dumped
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python(self.target.implementation), "-m", "pallas_kernels.aot.worker", self.target.name, folder / "dump"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env=environment,
                text=True,
            )
        try:
            self.versions = self.read(STARTING)["ready"]
        except WorkerError as error:
            self.never_ready = f"the compiler does not start: {error}"
            raise WorkerError(self.never_ready) from None

    def ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a job, as worker.py gives it. Raises WorkerError where there is none."""
        if self.process is None:
            self.start()
        assert self.process is not None and self.process.stdin is not None
        logged = self.log.stat().st_size
        with contextlib.suppress(BrokenPipeError):  # it has ended; reading tells how
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        result = self.read(self.timeout)["result"]
        if result["verdict"] == results.FAILED:
            result["reason"] = explained(result["reason"], self.log.read_bytes()[logged:].decode(errors="replace"))
        return result

    def read(self, timeout: float) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            self.end()
            raise WorkerError(f"no answer in {timeout:.0f} s")
        line = self.process.stdout.readline()
        if line.endswith("\n"):
            return json.loads(line)
        code, said = self.process.wait(), self.log.read_text(errors="replace")
        self.end()
        raise WorkerError(crashed(code, said))

    def end(self) -> None:
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):  # a job that was never read
                stream.close()
        self.process = None
        self.folder.cleanup()


def explained(reason: str, said: str) -> str:
    """The reason, with what MLIR said of it on the way, which exceptions leave out."""
    error = re.search(r"\berror: (.+)", said)
    return results.shortened(f"{reason}: {error[1]}") if error and error[1] not in reason else reason


def crashed(code: int, said: str) -> str:
    """One line of how a process ended: its signal or exit code, and the line of its log that says why, if one does."""
    how = f"the compiler crashed ({signal.Signals(-code).name})" if code < 0 else f"it ended with exit code {code}"
    lines = [line.strip() for line in said.splitlines() if re.search(r"\w", line)]
    telling = [line for line in lines if re.search(r"Check failed|^F\d{4} |\bFATAL\b|terminate called|what\(\):", line)]
    line = (telling or (lines[-1:] if code >= 0 else []) or [""])[0]
    return f"{how}: {line}" if line else how
