"""Files of a Debian package, without root and without installing it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable

Say = Callable[[str], None]


def unpacked(package: str, size: str, working: str, say: Say) -> str:
    """Downloads `package` with apt-get and unpacks it below `working`; the folder that holds its files, from usr/ on. Package
    lists that are missing or old are fetched to `working` too, so nothing on the machine changes.

    Raises OSError or subprocess.SubprocessError where there is no apt-get, or no such package.
    """
    lists = [f"Dir::State::lists={working}/lists", f"Dir::Cache={working}/cache"]
    say(f"apt-get download {package} ({size})")
    try:
        _apt(working, [], "download", package)
    except subprocess.CalledProcessError:
        say("apt-get update, into a folder of its own: the package lists here do not have it")
        for part in ("lists/partial", "cache/archives/partial"):
            os.makedirs(os.path.join(working, part))
        _apt(working, lists, "update")
        _apt(working, lists, "download", package)
    file = next(name for name in os.listdir(working) if name.endswith(".deb"))
    say(f"dpkg-deb -x {file}")
    _run(working, "dpkg-deb", "-x", file, "unpacked")
    return os.path.join(working, "unpacked")


def reason(error: Exception) -> str:
    """The last line of what a command said, or of an exception."""
    text = getattr(error, "stderr", None) or str(error) or type(error).__name__
    return text.strip().splitlines()[-1]


def _apt(working: str, options: list[str], *command: str) -> None:
    settings = ["Acquire::Retries=1", "Acquire::http::Timeout=30", "APT::Sandbox::User=root", *options]
    _run(working, "apt-get", *(part for setting in settings for part in ("-o", setting)), "-q", *command)


def _run(folder: str, *command: str) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
