"""Several processes of one job on this machine: started together, told apart, ended together, started again after a crash."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO

from research.core import processes

LOST = {-signal.SIGABRT, processes.LOST}  # what a process ends by when it, or jax's coordination service, misses another


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def environment(index: int, count: int, port: int, devices: int, heartbeat: int) -> dict[str, str]:
    """What tells a child that it is process `index` of `count`, on so many simulated CPU devices."""
    return {
        "PYTHONUNBUFFERED": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        processes.COORDINATOR: f"localhost:{port}",
        processes.COUNT: str(count),
        processes.INDEX: str(index),
        processes.HEARTBEAT: str(heartbeat),
    }


def code_of(returned: int) -> int:
    """A return code of `subprocess` as a shell has it."""
    return returned if returned >= 0 else 128 - returned


class Job:
    """`count` processes of one command. `run` starts them and gives the worst exit code once all have ended."""

    def __init__(self, command: Sequence[str], count: int, devices: int, heartbeat: int, restarts: int):
        self._command, self._count, self._devices = list(command), count, devices
        self._heartbeat, self._restarts = heartbeat, restarts
        self._children: list[subprocess.Popen] = []
        self._asked: int | None = None
        self._mute = False  # whether what the children say cannot be handed on any more

    def forward(self, signum: int, frame: object = None) -> None:
        """Hands a signal on to every child; after it nothing is started again."""
        self._asked = signum
        for child in self._children:
            if child.poll() is None:
                child.send_signal(signum)

    def run(self) -> int:
        before = {s: signal.signal(s, self.forward) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            for attempt in range(self._restarts + 1):
                first, codes = self._once()
                crashed = first is not None and (codes[first] < 0 or codes[first] in LOST)
                if not crashed or self._asked is not None or attempt == self._restarts:
                    break
                self._say(
                    f"{self._told(first, codes[first])}; all {self._count} start again ({attempt + 1} of {self._restarts})"
                )
            return max(*map(code_of, codes), int(self._mute))
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def _silenced(self, error: OSError) -> None:
        """Asks all to stop, since their output has nowhere to go; what they still say is dropped, lest they wait with it."""
        self._mute = True
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        with contextlib.suppress(OSError):
            self._say(f"what the processes print cannot be written ({error.strerror}): all are asked to save and stop")
        self.forward(signal.SIGTERM)

    def _say(self, line: str) -> None:
        print(f"gnomon launch: {line}", file=sys.stderr, flush=True)

    def _told(self, index: int, code: int) -> str:
        return f"process {index} was ended by {signal.Signals(-code).name}" if code < 0 else f"process {index} lost another"

    def _once(self) -> tuple[int | None, list[int]]:
        """(the process that failed first, return codes) of one attempt."""
        port = free_port()
        alive, held = os.pipe()  # closed by the kernel when this process is gone, which tells the children
        self._children = [
            subprocess.Popen(
                self._command,
                env={
                    **os.environ,
                    **environment(i, self._count, port, self._devices, self._heartbeat),
                    processes.LAUNCHER: str(alive),
                },
                pass_fds=[alive],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C in the terminal reaches them through `forward` alone, once
            )
            for i in range(self._count)
        ]
        os.close(alive)
        if self._asked is not None:  # a signal that came before there was a child to hand it to
            self.forward(self._asked)
        readers = [threading.Thread(target=copied, args=(i, c.stdout, self._silenced)) for i, c in enumerate(self._children)]
        for reader in readers:
            reader.start()
        first = self._ended()
        for reader in readers:
            reader.join()
        os.close(held)
        return first, [child.wait() for child in self._children]

    def _ended(self) -> int | None:
        """Waits for all, once one has failed only until the others must have noticed; which one failed first."""
        first, until = None, None
        while any(child.poll() is None for child in self._children):
            failed = [i for i, child in enumerate(self._children) if child.poll()]
            if failed and first is None:
                of_itself = [i for i in failed if self._children[i].returncode not in LOST]
                first, until = (of_itself or failed)[0], time.monotonic() + self._heartbeat + 10
            if until is not None and time.monotonic() > until:
                for child in self._children:
                    if child.poll() is None:
                        child.kill()
            time.sleep(0.05)
        failed = [i for i, child in enumerate(self._children) if child.returncode]
        of_itself = [i for i in failed if self._children[i].returncode not in LOST]
        return first if first is not None else (of_itself or failed or [None])[0]


GREETING = re.compile(rb"\[Gloo\] Rank|Expected number of connected peer ranks is")
_lock = threading.Lock()


def copied(index: int, lines: IO[bytes], failed: Callable[[OSError], None]) -> None:
    """Prints the lines of one process as they come, each with its number; not those in which gloo greets its peers. Where that
    fails, `failed` is called, and the next line is tried."""
    for line in lines:
        if not GREETING.search(line):
            with _lock:
                try:
                    sys.stdout.buffer.write(b"[%d] " % index + line.rstrip(b"\r\n") + b"\n")
                    sys.stdout.buffer.flush()
                except OSError as error:
                    failed(error)
