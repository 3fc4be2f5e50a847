"""What the verbs share: arguments, and errors told in one line."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax

from research.core import processes
from research.core.checkpoint import CheckpointError
from research.core.config import ConfigError
from research.core.interrupts import Interrupted
from research.core.names import suggestion
from research.core.nonfinite import NonFiniteError

PACKAGE = Path(__file__).resolve().parent
BAD_INPUT, FAILED = 2, 1
UNREAD = 141  # as a shell says that a process has ended by SIGPIPE


class Parser(argparse.ArgumentParser):
    """One that refuses in one line, with exit code 2, and says which option is nearest to one that there is not."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(BAD_INPUT)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name, options = unknown[0].partition("=")[0], list(self._option_string_actions)
            self.error(f"{name} is unknown; allowed: {', '.join(options)}{suggestion(name, options)}")
        return found


def parser(verb: str, description: str, example: str) -> argparse.ArgumentParser:
    """An argument parser whose help ends with a working example."""
    return Parser(
        prog=f"gnomon {verb}",
        description=description,
        epilog=f"--config.key=value changes a key of the config, where there is one.\n\nexample:\n  gnomon {verb} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _ours(error: BaseException) -> bool:
    """Whether the error was raised by a line of this project, or of a user's config, and not from deep inside a library."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return "site-packages" not in last or PACKAGE in Path(last).parents


def _unread() -> bool:
    """Whether standard output is a pipe that nobody reads. It leads nowhere then, so that Python's last flush does not fail."""
    try:
        out = select.poll()
        out.register(sys.stdout, 0)
        unread = bool(out.poll(0))
    except (OSError, ValueError):  # no file of the system's
        return False
    if unread:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
    return unread


@contextlib.contextmanager
def one_line_errors(verb: str) -> Iterator[None]:
    """Ends the process with one line where the input is bad (code 2) or the run failed (code 1). What is neither is a fault of
    the code, and keeps its traceback."""
    code = None
    try:
        yield
        sys.stdout.flush()
    except Interrupted as error:
        code, line = error.code, f"ended by {error}; the same command starts again from what was saved"
    except (NonFiniteError, CheckpointError, processes.PeerError) as error:
        code, line = FAILED, str(error)
    except processes.JoinError as error:
        code, line = processes.LOST, str(error)
    except jax.errors.JaxRuntimeError as error:
        if (told := processes.loss_of_peer(error)) is None:
            raise
        code, line = processes.LOST, told
    except BrokenPipeError:
        if not _unread():
            raise
        code, line = UNREAD, "what read its output has ended"
    except OSError as error:
        if error.filename is None and error.errno is None and not _ours(error):
            raise
        named = f": {error.filename}" if error.filename is not None and str(error.filename) not in str(error) else ""
        code, line = BAD_INPUT if isinstance(error, FileNotFoundError) else FAILED, f"{error}{named}"
    except ValueError as error:
        if "\n" in str(error) or not (isinstance(error, ConfigError) or _ours(error)):
            raise
        code, line = BAD_INPUT, str(error)
    if code is not None:
        print(f"gnomon {verb}: {line}", file=sys.stderr, flush=True)
        if processes.count() > 1:
            processes.end(code)
        raise SystemExit(code)


def table(item: Any) -> str:
    """A `Table` (title, header, rows) as text in columns."""
    rows = [[str(cell) for cell in row] for row in (item.header, *item.rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(item.header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(["", item.title, lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def shown(value: Any) -> str:
    """A result as text: four significant digits after the point for a float, members in brackets."""
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list):
        return "[" + ", ".join(shown(v) for v in value) + "]"
    return str(value)


def trained_run(p: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds what names a trained run: its config, and its folder where that is not the default one."""
    p.add_argument("--config", required=True, metavar="PATH[:ARG]", help="the config it was trained by")
    p.add_argument("--workdir", help="the run's folder (default: runs/<config>-<arg>)")
    p.add_argument("--best", metavar="METRIC", help="the checkpoint that is best by a metric, such as val/bits_per_byte")
    p.add_argument("--mode", choices=("min", "max"), default="min", help="which value of --best is best (default: min)")
    return p
