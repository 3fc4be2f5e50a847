"""Set-up says in one line why it cannot go on, and leaves either a whole environment or none."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from tests.packaging import house

spec = importlib.util.spec_from_file_location("environment", house.ROOT / "scripts" / "environment.py")
environment = importlib.util.module_from_spec(spec)
sys.modules["environment"] = environment
spec.loader.exec_module(environment)


# Finding a Python


def fake_python(path: Path, change: str) -> None:
    """An interpreter that answers as the real one does after `change`; what it is asked to run with -I, it only prints."""
    run = f"import sys\n{change}\nexec(sys.argv[1])"
    path.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] || {{ echo ran "$0" "$@"; exit 0; }}\nexec \'{sys.executable}\' -c \'{run}\' "$2"\n'
    )
    path.chmod(0o755)


OLD = "sys.version_info = (3, 8, 10, None, None)"
NEW = "sys.version_info = (3, 15, 0, None, None)"
GOOD = "sys.version_info = (3, 12, 1, None, None)"
UNTRIED = "sys.version_info = (3, 14, 2, None, None)"
WITHOUT_VENV = f'{GOOD}; sys.modules["ensurepip"] = None'
WITHOUT_LZMA = f'{GOOD}; sys.modules["lzma"] = None'
PYPY = f'{GOOD}; import types; sys.implementation = types.SimpleNamespace(name="pypy")'


def choose(tmp_path: Path, pythons: dict[str, str | None], **more: str) -> subprocess.CompletedProcess[str]:
    """Runs scripts/setup where PATH has these interpreters only; None: a stub that does not run."""
    root = tmp_path / "a checkout"
    (root / "scripts").mkdir(parents=True)
    shutil.copy(house.ROOT / "scripts" / "setup", root / "scripts")
    path = tmp_path / "bin"
    path.mkdir()
    for tool in ("sh", "dirname", "sed"):
        (path / tool).symlink_to(shutil.which(tool))
    for name, change in pythons.items():
        if change is None:
            (path / name).write_text("#!/bin/sh\necho no such version >&2\nexit 127\n")
            (path / name).chmod(0o755)
        else:
            fake_python(path / name, change)
    return subprocess.run([root / "scripts" / "setup"], env={"PATH": str(path), **more}, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("pythons", "said"),
    [
        ({}, "Python 3.11 to 3.14 is needed, found none; install one, or name it: make PYTHON=/path/to/python3"),
        ({"python3": OLD}, "Python 3.11 to 3.14 is needed, found python3 is 3.8.10; install one"),
        ({"python3": OLD, "python": None, "python3.11": None}, "found python3 is 3.8.10; install one"),
        ({"python3": NEW, "python": OLD}, "found python3 is 3.15.0, python is 3.8.10; install one"),
        ({"python3": PYPY}, "found python3 is 3.12.1, which is not CPython; install one"),
        (
            {"python3": WITHOUT_VENV},
            "python3 is 3.12.1 but lacks: ensurepip (on Debian and Ubuntu: apt-get install python3-venv)",
        ),
        ({"python3": WITHOUT_LZMA}, "python3 is 3.12.1 but lacks: lzma (it was built without them; install a complete Python)"),
    ],
)
def test_a_python_that_does_not_serve_is_one_line(tmp_path, pythons, said):
    result = choose(tmp_path, pythons)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("set-up: ") and result.stderr.count("\n") == 1 and said in result.stderr
    assert not list((tmp_path / "a checkout").glob(".venv*"))


@pytest.mark.parametrize(
    ("pythons", "chosen"),
    [
        ({"python3": GOOD, "python3.13": GOOD}, "python3"),
        ({"python3": None, "python": GOOD}, "python"),
        ({"python3": OLD, "python3.12": WITHOUT_VENV, "python3.13": GOOD}, "python3.13"),
        ({"python3": UNTRIED, "python3.12": GOOD}, "python3.12"),
        ({"python3": UNTRIED}, "python3"),
    ],
)
def test_the_first_python_that_serves_is_taken(tmp_path, pythons, chosen):
    result = choose(tmp_path, pythons)
    assert result.returncode == 0, result.stderr
    script = tmp_path / "a checkout" / "scripts" / "environment.py"
    assert result.stdout.splitlines()[-1] == f"ran {tmp_path / 'bin' / chosen} -I {script}"


def test_a_python_that_is_named_is_taken_or_refused(tmp_path):
    named = tmp_path / "my python"
    fake_python(named, GOOD)
    assert f"ran {named}" in choose(tmp_path, {"python3": GOOD}, PYTHON=str(named)).stdout
    shutil.rmtree(tmp_path / "bin")
    shutil.rmtree(tmp_path / "a checkout")
    refused = choose(tmp_path, {"python3": GOOD}, PYTHON="/nowhere/python3")
    assert refused.returncode == 1
    assert refused.stderr == "set-up: PYTHON=/nowhere/python3 does not run; Python 3.11 to 3.14 is needed\n"


# Disks and indexes


def refusal(capsys, root: Path) -> str:
    """What set-up says on stderr; it must fail, in one line, and leave no environment."""
    assert environment.main([], root) == 1
    said = capsys.readouterr().err
    assert said.startswith("set-up: ") and said.count("\n") == 1
    assert not (root / ".venv").exists()
    return said


def test_a_disk_nearly_full_is_one_line_before_anything_is_fetched(tmp_path, capsys, monkeypatch):
    root = house.checkout(tmp_path / "checkout")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10e9, 9.7e9, 0.3e9))
    assert refusal(capsys, root) == f"set-up: the disk is nearly full: {root} needs 2.5 GB free and has 0.3 GB\n"
    assert not (root / ".venv-setup" / "tmp").exists()


def test_a_disk_that_fills_up_on_the_way_is_one_line(tmp_path, capsys, monkeypatch):
    root = house.checkout(tmp_path / "checkout")

    def fill(made, say, held):
        made.folder.mkdir()
        (made.folder / "half").write_text("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(made.folder / "more"))

    monkeypatch.setattr(environment, "create", fill)
    assert refusal(capsys, root) == f"set-up: {root / '.venv' / 'more'}: No space left on device\n"


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    root = house.checkout(tmp_path / "checkout")
    (root / ".venv-setup").write_text("a file where the folder should be")
    assert "File exists" in refusal(capsys, root)


HASHES = """
ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. If you have updated the package versions, ...
    jax==0.10.2 from file:///x (from -r lock.txt):
        Expected sha256 0
             Got        1
"""
UNREACHABLE = """
WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError('<pip._vendor.HTTPSConnection at 0x7f>: \
Failed to establish a new connection: [Errno -2] Name or service not known')': /simple/jax/
ERROR: Could not find a version that satisfies the requirement jax==0.10.2 (from versions: none)
ERROR: No matching distribution found for jax==0.10.2
"""


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n", "the disk is full: "),
        ("OSError: [Errno 122] Disk quota exceeded\nERROR: something else", "the disk is full: "),
        (HASHES, "jax==0.10.2 is not the file that was locked"),
        (UNREACHABLE, "index cannot be reached: NewConnectionError('Failed to establish a new connection: [Errno -2] Name or"),
        ("ERROR: HTTP error 403 while getting /simple/jax.whl\n", "cannot be reached: HTTP error 403 while getting"),
        (
            "ERROR: No matching distribution found for jaxlib==0.10.2\n",
            "the package index has no wheel of jaxlib==0.10.2 for Python",
        ),
        ("\nERROR: first\nERROR: the last word\n\n", "pip failed: the last word"),
        ("", "pip failed: no output"),
    ],
)
def test_every_failure_of_pip_is_told_in_one_line(tmp_path, output, said):
    told = environment.explain(output.splitlines(), environment.Environment(tmp_path, ""))
    assert said in told and "\n" not in told


def test_an_unknown_environment_names_those_that_there_are(tmp_path):
    root = house.checkout(tmp_path / "checkout")
    (root / "requirements" / "peers.txt").write_text("")
    with pytest.raises(environment.SetupError, match="no environment 'pears'; there are: peers"):
        environment.environment(root, "pears")


# Whole environments or none


ODD = {
    "PIP_USER": "1",
    "PIP_TARGET": "/nowhere/target",
    "PIP_PREFIX": "/nowhere/prefix",
    "PIP_DRY_RUN": "1",
    "PIP_NO_BINARY": ":all:",
    "PIP_CONSTRAINT": "/nowhere/constraint.txt",
    "PIP_LOG": "/nowhere/log",
    "PYTHONHOME": "/nowhere/home",
    "PYTHONOPTIMIZE": "2",
    "PYTHONWARNINGS": "error",
    "HOME": "/dev/null",  # nothing can be written below it, not even by root
    "TMPDIR": "/dev/null",
}


def test_set_up_from_nothing_is_whole_then_idle_then_repairs_itself(tmp_path):
    root = house.checkout(tmp_path / "a path with spaces")
    trap = tmp_path / "trap"
    trap.mkdir()
    for name in ("jax", "json", "pip"):
        (trap / f"{name}.py").write_text("raise SystemExit('PYTHONPATH reached set-up')")
    around = house.offline(root, **ODD, PYTHONPATH=str(trap))
    python = root / ".venv" / "bin" / "python"

    made = house.set_up(root, around)
    assert made.returncode == 0, made.stdout + made.stderr
    assert "making .venv with Python" in made.stdout and ".venv is ready" in made.stdout
    versions = subprocess.run([python, "-I", "-c", "import jax, research; print(jax.version)"], capture_output=True, text=True)
    assert versions.stdout == "1.0\n"

    # again: nothing to do and nothing said
    stamp = (root / ".venv" / "made-from.json").stat().st_mtime_ns
    again = house.set_up(root, around)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert (root / ".venv" / "made-from.json").stat().st_mtime_ns == stamp

    # the project's own settings changed: the packages are not fetched again
    (root / "pyproject.toml").write_text((root / "pyproject.toml").read_text() + "\n")
    (root / ".venv" / "marker").write_text("")
    changed = house.set_up(root, around)
    assert changed.returncode == 0 and "settings have changed" in changed.stdout and (root / ".venv" / "marker").exists()

    # a file is lost: everything is made anew, and a failure on the way leaves no environment
    next((root / ".venv").rglob("jax.py")).unlink()
    (root / "wheels" / "numpy-1.0-py3-none-any.whl").write_bytes((root / "wheels" / "jax-1.0-py3-none-any.whl").read_bytes())
    broken = house.set_up(root, around)
    assert broken.returncode == 1 and "jax.py is missing from it" in broken.stdout
    assert broken.stderr.startswith("set-up: ") and broken.stderr.count("\n") == 1 and "numpy" in broken.stderr
    assert not (root / ".venv").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"packages": "0"}, "its requirements have changed"),
        ({"python": "3.9.1"}, "it was made with Python 3.9.1"),
        ({"interpreter": "/elsewhere"}, "it was made with another Python, in /elsewhere"),
        ({"folder": "/elsewhere/.venv"}, "it was made for another folder, /elsewhere/.venv"),
        ({}, "its Python no longer runs"),
        (None, "it was left half-made"),
    ],
)
def test_an_environment_of_other_making_is_not_taken(tmp_path, change, said):
    made = environment.Environment(house.checkout(tmp_path / "checkout"), "")
    wanted = environment.wanted_stamp(made)
    assert environment.what_is_wrong(made, wanted) == "there is none yet"
    made.folder.mkdir()
    made.stamp.write_text("half a st" if change is None else json.dumps(wanted | change))
    assert environment.what_is_wrong(made, wanted) == said


def test_a_signal_whose_exception_is_lost_ends_the_set_up_all_the_same(tmp_path, monkeypatch):
    """As Python loses it where the handler runs in a finalizer."""

    def lost(*_) -> None:
        with contextlib.suppress(SystemExit):
            signal.raise_signal(signal.SIGTERM)

    root = house.checkout(tmp_path / "checkout")
    monkeypatch.setattr(environment, "create", lambda made, *_: made.folder.mkdir())
    monkeypatch.setattr(environment, "install_packages", lambda *_: None)
    monkeypatch.setattr(environment, "install_project", lost)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with pytest.raises(SystemExit) as left:
            environment.main([], root)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert left.value.code == 128 + signal.SIGTERM and not (root / ".venv").exists()


@pytest.mark.slow
@pytest.mark.faults
def test_set_ups_at_once_take_turns(tmp_path):
    root = house.checkout(tmp_path / "checkout")
    command = [root / "scripts" / "setup"]
    both = [subprocess.Popen(command, env=house.offline(root), stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0, 0]
    assert sum("making .venv" in text for text in said) == 1
    assert house.set_up(root, house.offline(root)).stdout == ""


def written(root: Path) -> str:
    log = root / ".venv-setup" / "log"
    return log.read_text() if log.exists() else ""


MOMENTS = {
    "the environment is being made": lambda root: (root / ".venv" / "pyvenv.cfg").exists(),
    "packages are being fetched": lambda root: "$ pip" in written(root),
    "packages are being installed": lambda root: "Installing collected" in written(root),
    "the project is being installed": lambda root: "--editable" in written(root),
}


def heard() -> None:
    """Ctrl-C is not ignored, as it is in what a shell runs in the background, this test perhaps."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize(
    ("number", "moments"),
    [(signal.SIGINT, list(MOMENTS)[::2]), (signal.SIGTERM, list(MOMENTS)[1::2]), (signal.SIGKILL, list(MOMENTS))],
    ids=["SIGINT", "SIGTERM", "SIGKILL"],
)
def test_an_interrupted_set_up_leaves_nothing_that_is_used(tmp_path, number, moments):
    root = house.checkout(tmp_path / "checkout")
    for moment in moments:
        command, out = [root / "scripts" / "setup"], subprocess.PIPE
        process = subprocess.Popen(command, env=house.offline(root), stdout=out, stderr=out, text=True, preexec_fn=heard)
        while not MOMENTS[moment](root):
            assert process.poll() is None, f"set-up ended before {moment}"
            time.sleep(0.005)
        process.send_signal(number)
        said = process.communicate(timeout=60)
        assert process.returncode != 0, (moment, said)
        assert not (root / ".venv" / "made-from.json").exists(), moment
        if number != signal.SIGKILL:
            assert not (root / ".venv").exists(), moment
        (root / ".venv-setup" / "log").unlink(missing_ok=True)  # a killed set-up's last words are not the next one's
    after = house.set_up(root, house.offline(root))
    assert after.returncode == 0, after.stderr
    assert (root / ".venv" / "made-from.json").exists()
