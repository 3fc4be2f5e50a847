"""One of several processes: joining the others, and agreeing with them on what is no array.

A process learns from its environment alone that it is one of several: from ours, which `gnomon launch` and its JobSet manifest
set, or from SLURM's. Arrays then span processes by the mesh. What this module adds goes through the key-value store of jax's
coordination service, so it may be called from any thread, and costs nothing where there is one process.
"""

from __future__ import annotations

import collections
import contextvars
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

T = TypeVar("T")
COORDINATOR, COUNT, INDEX, HEARTBEAT = "GNOMON_COORDINATOR", "GNOMON_PROCESSES", "GNOMON_PROCESS", "GNOMON_HEARTBEAT"
FOREVER = 7 * 24 * 3600 * 1000  # milliseconds; a process that is gone is noticed by its heartbeat, long before
_calls: collections.Counter[str] = collections.Counter()

LAUNCHER = "GNOMON_LAUNCHER"  # the number of a pipe that nobody writes to, and that is at its end when `gnomon launch` is gone
STOPPED = "GNOMON_STOPPED"  # the exit code that is wanted of a run that was asked to stop and has saved, where that is not 0
LOST = 75  # the exit code of a process that cannot go on since another is gone
_LOSSES = re.compile(r"Gloo|NCCL|coordination|heartbeat|UNAVAILABLE|connection (reset|closed|refused)", re.IGNORECASE)


class PeerError(RuntimeError):
    """Another process failed at what all were doing; the message has its number and its words."""


class JoinError(RuntimeError):
    """The processes could not meet: their port is taken, or one of them did not come."""


def told_by(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is to be given; None where this process is alone.

    GNOMON_COORDINATOR=host:port, GNOMON_PROCESSES and GNOMON_PROCESS come first, then SLURM's variables of a step with several
    tasks. GNOMON_HEARTBEAT is the number of seconds after which a silent process counts as lost (default 100).
    Raises ValueError (one line) where some of ours are missing or are no numbers that fit together.
    """
    ours = {name: environ.get(name) for name in (COORDINATOR, COUNT, INDEX)}
    numbers = {name: environ.get(name) for name in (COUNT, INDEX, HEARTBEAT)}
    for name, given in numbers.items():
        if given is not None and not given.isdigit():
            raise ValueError(f"{name}={given!r}; allowed: a whole number")
    heartbeat = int(environ.get(HEARTBEAT, 100))
    if heartbeat < 1:
        raise ValueError(f"{HEARTBEAT}={heartbeat}; allowed: 1 or more seconds")
    waiting = {"heartbeat_timeout_seconds": heartbeat, "shutdown_timeout_seconds": heartbeat}
    if any(ours.values()):
        missing = [name for name, given in ours.items() if not given]
        if missing:
            raise ValueError(f"the environment lacks {', '.join(missing)}; allowed: all of {', '.join(ours)}, or none")
        count, index = int(ours[COUNT] or 0), int(ours[INDEX] or 0)
        if index >= count:
            raise ValueError(f"{INDEX}={index} of {COUNT}={count}; allowed: 0 to {count - 1}")
        return waiting | {"coordinator_address": ours[COORDINATOR], "num_processes": count, "process_id": index}
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return waiting | {"cluster_detection_method": "slurm"}
    return None


def join(environ: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes, where the environment tells of any; once, and before jax is asked for its devices.

    Raises JoinError (one line) where they do not meet.
    """
    told = told_by(environ)
    if told is None or distributed.global_state.client is not None:
        return
    _tell_fatal_errors_in_one_line()
    follow_launcher(environ)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM: see core.interrupts
    if told.get("process_id") == 0:
        _check_free(told["coordinator_address"])
    try:
        jax.distributed.initialize(**told)
    except jax.errors.JaxRuntimeError as error:
        raise JoinError(f"the processes did not meet: {str(error).splitlines()[0]}; allowed: all of them started") from error


def _check_free(address: str) -> None:
    """JoinError where this process, number 0, cannot take the port of "host:port", of which jaxlib may die without a word."""
    try:
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        port = int(address.rpartition(":")[2])
        socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6).close()
    except OSError as error:
        said = os.strerror(error.errno or 0)
        raise JoinError(f"the processes cannot meet at {address} ({said}); allowed: a free port") from error


def _tell_fatal_errors_in_one_line() -> None:
    """Standard error goes through a process that outlives this one: when a peer is lost, jax's coordination service ends the
    process from C++ with a page of text, which core/fatal_errors.py makes one line of."""
    script = Path(__file__).with_name("fatal_errors.py")
    reader = subprocess.Popen([sys.executable, "-ISu", script], stdin=subprocess.PIPE, stdout=2, start_new_session=True)
    assert reader.stdin is not None
    sys.stderr.flush()
    os.dup2(reader.stdin.fileno(), 2)
    reader.stdin.close()


def follow_launcher(environ: Mapping[str, str] = os.environ) -> None:
    """Asks this process to stop, as SIGTERM does, once the launcher that started it is gone, in whatever way: nobody would read
    its output any more, or end it. What it still says is dropped, so that it can save."""

    def wait(pipe: int) -> None:
        os.read(pipe, 1)
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        os.kill(os.getpid(), signal.SIGTERM)

    if LAUNCHER in environ:
        threading.Thread(target=wait, args=(int(environ[LAUNCHER]),), name="launcher", daemon=True).start()


def store() -> Any:
    """The key-value store that the processes share; only where there are several."""
    return distributed.global_state.client


def count() -> int:
    """How many processes the run has; asks no device."""
    return distributed.global_state.num_processes if distributed.global_state.client is not None else 1


def index() -> int:
    """The number of this process, 0 where it is alone."""
    return distributed.global_state.process_id if distributed.global_state.client is not None else 0


def exchange(name: str, value: Any, verdict: Callable[[list[Any]], Any] = list) -> Any:
    """`verdict` of what every process gave under this name, in order of process; all wait for it. Values are JSON-able.

    Process 0 collects and judges. Every process must come to the exchanges of one name in the same order; other names may go on
    at the same time in other threads.
    """
    client = store()
    if client is None:
        return verdict([value])
    _calls[name] += 1
    here, before = f"gnomon/{name}/{_calls[name]}", f"gnomon/{name}/{_calls[name] - 1}"
    if index():
        client.key_value_set(f"{here}/{index()}", json.dumps(value))
    else:
        others = [json.loads(client.blocking_key_value_get(f"{here}/{i}", FOREVER)) for i in range(1, count())]
        client.key_value_set(f"{here}/verdict", json.dumps(verdict([value, *others])))
        client.key_value_delete(before)  # whoever came to this exchange has left the one before
    return json.loads(client.blocking_key_value_get(f"{here}/verdict", FOREVER))


def loss_of_peer(error: BaseException) -> str | None:
    """One line, where this error of jax says that another process is gone; else None."""
    said = str(error).strip().splitlines()
    if count() == 1 or not isinstance(error, jax.errors.JaxRuntimeError) or not said or not _LOSSES.search(said[0]):
        return None
    return (
        f"another process is lost ({said[0][:200]}): this process ends too; the same command goes on from the last checkpoint"
    )


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def first(name: str, function: Callable[[], T], raising: type[Exception] = ValueError) -> T:
    """The value of `function()`, JSON-able, which process 0 alone calls; the others wait for it.

    Where it raises, so does every process: process 0 what it was, the others `raising` with the same words.
    """
    if count() == 1:
        return function()
    value, error = None, None
    if index() == 0:
        try:
            value = function()
        except Exception as raised:  # raised below, when the others know
            error = raised
    told = exchange(name, [value, None if error is None else str(error)], lambda all_: all_[0])
    if error is not None:
        raise error
    if told[1] is not None:
        raise raising(told[1])
    return told[0]


def everywhere(name: str, function: Callable[[], T]) -> T:
    """The value of `function()` here, when every process has come through it.

    Where one raises, all do: that process what it was, the others a PeerError with its number and words, also those whose
    function is still waiting for that process: it is left to itself, in the thread that it was called in.
    """
    if count() == 1:
        return function()
    failing = f"gnomon/{name}/{_calls[name] + 1}/failing"
    came: list[T] = []
    errors: list[Exception] = []

    def called() -> None:
        try:
            came.append(function())
        except Exception as raised:
            errors.append(raised)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(called,), name=name, daemon=True)
    thread.start()
    while thread.is_alive() and not _is_set(failing):
        thread.join(0.05)
    error = errors[0] if errors else None
    if error is not None:
        store().key_value_set(failing, "", allow_overwrite=True)

    def failed(lines: list[str | None]) -> str | None:
        return next((f"process {i}: {line}" for i, line in enumerate(lines) if line), None)

    told = exchange(name, None if error is None else _line(error), failed)
    if error is not None:
        raise error
    if told is not None:
        raise PeerError(told)
    return came[0]


def _is_set(key: str) -> bool:
    """Whether any process has set this key of the store."""
    try:
        store().key_value_try_get(key)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" not in str(error):
            raise
        return False
    return True


def check_same(facts: Mapping[str, Any]) -> None:
    """ValueError in every process, naming the first fact of {name: JSON-able} that is not the same in all of them."""

    def difference(given: list[dict[str, Any]]) -> str | None:
        for name in sorted({key for one in given for key in one}):
            here = given[0].get(name, "absent")
            for i, one in enumerate(given):
                if (there := one.get(name, "absent")) != here:
                    return f"process {i} was started with {name}={there!r}, process 0 with {here!r}"
        return None

    found = exchange("facts", dict(facts), difference)
    if found is not None:
        raise ValueError(f"{found}; allowed: one config and one version of the code in all processes")


def code_sha256(package: Path) -> str:
    """SHA-256 (hex) over every Python file below a folder, by path and content."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def on_host(x: Any) -> np.ndarray:
    """The whole of an array, wherever its parts are; every process must ask for it, in the same order."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def end(code: int) -> NoReturn:
    """Ends this process of several at once, without waiting for the others, as jax's own end would; process 0, which keeps the
    others' store, lets those that fail too say so first."""
    client = store()
    try:
        if index():
            client.key_value_set(f"gnomon/left/{index()}", "", allow_overwrite=True)
        for i in range(1, count()) if index() == 0 else ():
            client.blocking_key_value_get(f"gnomon/left/{i}", 2000)
        time.sleep(0.0 if index() else 0.5)  # they are on their way out
    except jax.errors.JaxRuntimeError:  # that one is gone already, or goes on until it misses this process
        pass
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
