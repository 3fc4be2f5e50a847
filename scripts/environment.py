"""Makes an environment from the hashed lock, once: `python -I scripts/environment.py [NAME]` gives .venv, or .venv-NAME.

Only the standard library is imported here. What an environment holds:
    requirements/lock.txt     every package, by version and hash
    requirements/NAME.txt     what NAME adds to it: torch in "peers", by version; compilers in "tpu" and "cuda", by hash as well
    the project               editable

A stamp inside the environment, written last, says what it was made from. No stamp, another stamp or a missing file: the
environment is made anew, so that nothing half-made is ever used. All set-ups in one checkout take turns. Everything that is not
the environment itself (pip's log, its temporary files, the turn-taking lock) is in .venv-setup.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
GIGABYTE = 1e9
# Settings that say how to reach packages. All other pip settings (target, user, constraint, no-binary, …) would change what is
# installed, and are left out.
REACHING = {
    *("index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "cert", "client-cert", "proxy"),
    *("timeout", "default-timeout", "retries", "cache-dir", "no-cache-dir", "keyring-provider"),
}
NEEDED = {"": 2.5, "tpu": 3.0, "cuda": 3.0}  # GB: what is installed, the wheels while they are unpacked, and some to spare
NEEDED_ELSE = 6.0
FULL = ("No space left on device", "Disk quota exceeded")


class SetupError(Exception):
    """Set-up cannot go on; the message is the one line that says why."""


class Environment(NamedTuple):
    """Where an environment goes and what it is made from."""

    root: Path
    name: str

    @property
    def folder(self) -> Path:
        return self.root / (f".venv-{self.name}" if self.name else ".venv")

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def stamp(self) -> Path:
        return self.folder / "made-from.json"

    @property
    def lock(self) -> Path:
        return self.root / "requirements" / "lock.txt"

    @property
    def additions(self) -> Path | None:
        return self.root / "requirements" / f"{self.name}.txt" if self.name else None

    @property
    def needed(self) -> float:
        """Bytes that must be free before it is made."""
        return NEEDED.get(self.name, NEEDED_ELSE) * GIGABYTE


def environment(root: Path, name: str) -> Environment:
    made = Environment(root, name)
    if not made.lock.is_file():
        raise SetupError(f"{made.lock} is missing; is the checkout complete?")
    if made.additions is not None and not made.additions.is_file():
        known = sorted(p.stem for p in (root / "requirements").glob("*.txt") if p.stem != "lock")
        raise SetupError(f"there is no environment {name!r}; there are: {', '.join(known) or 'none'}")
    return made


# What an environment was made from, and whether it still is


def wanted_stamp(made: Environment) -> dict[str, str]:
    """Two hashes and three facts; where any differs, the environment is not the wanted one."""
    sources = [made.lock, *([made.additions] if made.additions else [])]
    project = [made.root / "pyproject.toml", made.root / "setup.py"]

    def digest(paths: Sequence[Path]) -> str:
        return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()

    return {
        "packages": digest(sources),
        "project": digest(project),
        "python": platform.python_version(),
        "interpreter": os.path.realpath(sys.base_prefix),
        "folder": str(made.folder),  # environments cannot be moved
    }


def stamp_found(made: Environment) -> dict[str, str]:
    """The stamp of the environment that is there; {} where there is none that can be read."""
    try:
        found = json.loads(made.stamp.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def site_packages(made: Environment) -> Path:
    return made.folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"


def missing_file(site: Path) -> str | None:
    """The first file that a package's RECORD lists and that is not there."""
    present = {os.path.join(folder, name) for folder, _, names in os.walk(site) for name in names}
    for record in sorted(site.glob("*.dist-info/RECORD")):
        with record.open(newline="", encoding="utf-8") as lines:
            for row in csv.reader(lines):
                path = os.path.normpath(os.path.join(site, row[0])) if row else ""
                if path and not path.endswith(".pyc") and path not in present and not os.path.exists(path):
                    return row[0]
    return None


def runs(made: Environment) -> bool:
    try:
        return subprocess.run([made.python, "-I", "-S", "-c", ""], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def what_is_wrong(made: Environment, wanted: Mapping[str, str]) -> str | None:
    """Why the environment that is there cannot be used; None where it can."""
    found = stamp_found(made)
    if not found:
        return "it was left half-made" if made.folder.exists() else "there is none yet"
    reasons = {
        "packages": "its requirements have changed",
        "project": "the project's own settings have changed",
        "python": f"it was made with Python {found.get('python')}",
        "interpreter": f"it was made with another Python, in {found.get('interpreter')}",
        "folder": f"it was made for another folder, {found.get('folder')}",
    }
    for key, reason in reasons.items():
        if found.get(key) != wanted[key]:
            return reason
    if not runs(made):
        return "its Python no longer runs"
    missing = missing_file(site_packages(made))
    return f"{missing} is missing from it" if missing else None


# Turns: one set-up at a time


@contextlib.contextmanager
def turn(work: Path, say: Progress) -> Iterator[IO[str]]:
    """Waits for other set-ups in this checkout. The kernel ends a turn with its processes, so no turn is ever left behind."""
    work.mkdir(exist_ok=True)
    with (work / "turn").open("a+") as handle:
        waited = False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waited:
                    say.line("another set-up is at work in this folder; waiting for it")
                waited = True
                time.sleep(0.5)
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    break  # a file system without locks: then it is for the user to start one set-up at a time
                raise
        yield handle


class Progress:
    """One line that is rewritten on a terminal; elsewhere a new line every ten seconds."""

    def __init__(self, stream: IO[str], every: float = 10.0):
        self.stream, self.every = stream, every
        self.rewrite = stream.isatty()
        self.started = self.last = time.monotonic()
        self.open = False

    def line(self, text: str) -> None:
        self._end()
        print(f"set-up: {text}", file=self.stream, flush=True)
        self.last = time.monotonic()

    def now(self, text: str) -> None:
        seconds = f"{time.monotonic() - self.started:.0f} s"
        if self.rewrite:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{f'set-up: {text}, {seconds}'[:width]}", end="", file=self.stream, flush=True)
            self.open = True
        elif time.monotonic() - self.last >= self.every:
            self.line(f"{text}, {seconds}")

    def _end(self) -> None:
        if self.open:
            print("\r\x1b[K", end="", file=self.stream)
            self.open = False


# pip


def reaching(python: Path) -> dict[str, str]:
    """PIP_* variables for those of the user's pip settings, from files and variables, that say how to reach packages."""
    listed = subprocess.run([python, "-I", "-m", "pip", "config", "list"], capture_output=True, text=True)
    found: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listed.stdout.splitlines():
        match = re.match(r"(global|install|:env:)\.([\w-]+)=(.*)$", line)
        if match and match[2] in REACHING:
            with contextlib.suppress(ValueError, SyntaxError):
                found[match[1]][match[2]] = str(ast.literal_eval(match[3]))
    settings = {**found["global"], **found["install"], **found[":env:"]}
    return {"PIP_" + key.upper().replace("-", "_"): value for key, value in settings.items()}


def pip_environment(settings: Mapping[str, str], temporary: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    fixed = {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_INPUT": "1",
        "TMPDIR": str(temporary),  # /tmp may be small; the space beside the environment has been looked at
    }
    return {**kept, **settings, **fixed}


def run_pip(made: Environment, arguments: Sequence[str], work: Path, say: Progress, turn_held: IO[str], doing: Doing) -> None:
    """Runs pip with its output in the log, telling from it how far it is. Raises SetupError with the reason where it fails."""
    log = work / "log"
    temporary = work / "tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    command = [str(made.python), "-I", "-m", "pip", "install", "--no-color", "--progress-bar=off", *arguments]
    lines: list[str] = []
    with log.open("a", buffering=1, encoding="utf-8", errors="replace") as kept:
        kept.write(f"$ pip {' '.join(arguments)}\n")
        child = subprocess.Popen(
            command,
            cwd=made.root,
            env=pip_environment(reaching(made.python), temporary),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=[turn_held.fileno()],  # should this process be killed, the turn lasts until pip has ended as well
        )

        def read() -> None:
            assert child.stdout is not None
            for line in child.stdout:
                lines.append(line.rstrip("\n"))
                kept.write(line)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            while child.poll() is None:
                time.sleep(0.25)
                say.now(doing.how_far(list(lines)))
            reader.join()
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
            shutil.rmtree(temporary, ignore_errors=True)
    if child.returncode:
        raise SetupError(f"{explain(lines, made)} (all of it: {log})")


class Doing(NamedTuple):
    """What pip is at work on, to be told from its output and from what is installed so far."""

    what: str
    site: Path
    total: int = 0

    def how_far(self, lines: Sequence[str]) -> str:
        installing = next((line for line in lines if line.startswith("Installing collected packages: ")), None)
        if installing is not None:
            total = installing.count(",") + 1
            return f"installing {self.what}: {min(len(list(self.site.glob('*.dist-info'))), total)} of {total}"
        names = [line.split()[1] for line in lines if line.startswith("Collecting ")]
        if not names:
            return f"preparing {self.what}"
        of = f" of at most {self.total}" if self.total else ""
        return f"fetching {self.what}: {len(names)}{of}, {re.split('[=<>!~;[]', names[-1])[0]}"


def explain(lines: Sequence[str], made: Environment) -> str:
    """One line that says why pip failed."""
    text = "\n".join(lines)
    if any(words in text for words in FULL):
        return f"the disk is full: {made.root} needs {gigabytes(made.needed)} free"
    if "DO NOT MATCH THE HASHES" in text:
        named = re.search(r"^\s+(\S+==\S+).*from ", text, re.MULTILINE)
        return f"{named[1] if named else 'a package'} is not the file that was locked: its hash differs; nothing was installed"
    broken = re.findall(r"connection broken by '(.*)': /", text)
    refused = re.search(r"(HTTP error \d+ while getting \S+|\d{3} (?:Client|Server) Error: .*)", text)
    if broken or refused or "Could not find a version that satisfies" in text and "Could not fetch URL" in text:
        reason = re.sub(r"<[^>]*>[,:]?\s*", "", broken[-1]) if broken else refused[1] if refused else "no answer"
        return f"the package index cannot be reached: {reason}; see the network, or name another with PIP_INDEX_URL"
    lacking = re.search(r"No matching distribution found for (\S+)", text)
    if lacking:
        system = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
        return f"the package index has no wheel of {lacking[1]} for {system}"
    errors = [line for line in lines if line.startswith("ERROR:")] or [line for line in lines if line.strip()] or ["no output"]
    return f"pip failed: {errors[-1].removeprefix('ERROR:').strip()}"


# The set-up itself


def gigabytes(number: float) -> str:
    return f"{number / GIGABYTE:.1f} GB"


def check_space(made: Environment) -> None:
    free = shutil.disk_usage(made.root).free
    if free < made.needed:
        raise SetupError(f"the disk is nearly full: {made.root} needs {gigabytes(made.needed)} free and has {gigabytes(free)}")


def remove(folder: Path) -> None:
    try:
        if folder.is_symlink() or folder.is_file():
            folder.unlink()
        elif folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        raise SetupError(f"{error.filename or folder} cannot be removed: {error.strerror}") from error


def create(made: Environment, say: Progress, held: IO[str]) -> None:
    """An empty environment. `python -m venv` rather than the module, so that its failures can be told in a line."""
    child = subprocess.Popen(
        [sys.executable, "-I", "-m", "venv", str(made.folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=[held.fileno()],
    )
    output = None
    try:
        while output is None:
            try:
                output = child.communicate(timeout=0.25)[0]
            except subprocess.TimeoutExpired:
                say.now("preparing an empty environment")
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
    if child.returncode:
        if any(words in output for words in FULL):
            raise SetupError(explain(output.splitlines(), made))
        said = [line for line in output.splitlines() if line.strip()] or ["no output"]
        raise SetupError(f"python -m venv failed with {sys.executable}: {said[-1].strip()}")


def install_project(made: Environment, work: Path, say: Progress, held: IO[str]) -> None:
    site = site_packages(made)
    arguments = ["--no-deps", "--no-build-isolation", "--no-index", "--editable", str(made.root)]
    run_pip(made, arguments, work, say, held, Doing("the project", site))
    looked_at = subprocess.run(
        [made.python, "-I", "-c", "import jax, numpy, research"], capture_output=True, text=True, cwd=made.root
    )
    if looked_at.returncode:
        raise SetupError(f"what was installed does not import: {(looked_at.stderr.strip().splitlines() or ['no output'])[-1]}")


def install_packages(made: Environment, work: Path, say: Progress, held: IO[str]) -> None:
    site = site_packages(made)
    locked = len(re.findall(r"^\S+==", made.lock.read_text(), re.MULTILINE))
    hashed = ["--require-hashes", "--only-binary=:all:", "--no-deps", "--no-compile", "-r", str(made.lock)]
    run_pip(made, hashed, work, say, held, Doing("packages", site, locked))
    if made.additions is not None:
        run_pip(made, ["--no-compile", "-r", str(made.additions)], work, say, held, Doing(f"{made.name} packages", site))


def set_up(made: Environment, say: Progress, signals: Sequence[int]) -> None:
    """Makes the environment, or leaves it as it is where it is the wanted one.

    signals: those that have told this process to stop so far. Their handler raises, but Python drops what is raised in a
    finalizer: they are looked at before the environment is called done.
    """
    wanted = wanted_stamp(made)
    if what_is_wrong(made, wanted) is None:
        return
    work = made.root / ".venv-setup"
    with turn(work, say) as held:
        wrong = what_is_wrong(made, wanted)  # another set-up may have made it meanwhile
        if wrong is None:
            return
        (work / "log").write_text("")
        only_the_project = stamp_found(made) | {"project": wanted["project"]} == wanted and "settings" in wrong
        if not only_the_project:
            remove(made.folder)
            check_space(made)
        say.line(f"making {made.folder.name} with Python {wanted['python']} ({wrong}); this takes a minute or a few")
        try:
            if only_the_project:
                made.stamp.unlink()
            else:
                create(made, say, held)
                install_packages(made, work, say, held)
            install_project(made, work, say, held)
            if signals:
                raise SystemExit(128 + signals[0])
            draft = made.stamp.with_suffix(".draft")
            draft.write_text(json.dumps(wanted, indent=1) + "\n")
            draft.replace(made.stamp)
        except BaseException:
            say.line("removing what was half-made")
            shutil.rmtree(made.folder, ignore_errors=True)
            raise
    say.line(f"{made.folder.name} is ready, {time.monotonic() - say.started:.0f} s")


def main(arguments: Sequence[str], root: Path = ROOT) -> int:
    say = Progress(sys.stdout)
    signals: list[int] = []

    def stop(signum: int, frame: Any) -> None:
        signals.append(signum)
        raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(128 + signum)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, stop)
    try:
        set_up(environment(root, arguments[0] if arguments else ""), say, signals)
    except SetupError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"set-up: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("set-up: interrupted; the same command starts over", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
