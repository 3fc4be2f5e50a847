"""Fashion-MNIST: 60,000 and 10,000 grey images of ten kinds of clothing, 28 x 28.

Source: H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms"
(arXiv 1708.07747). The files are the four of its repository; Debian packages them as dataset-fashion-mnist. What is in them is
checked by sha256 wherever they come from; those sums were taken from files whose md5 sums are the published ones.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import tempfile
import urllib.request
import zlib

import numpy as np

from research.data.debian import Say, reason, unpacked
from research.data.folder import data_folders, made_writable, writable_folder
from research.data.images import images_from_idx

PACKAGE = "dataset-fashion-mnist"
SYSTEM_FOLDER = "/usr/share/datasets/fashion-mnist"
MIRROR = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
COMMAND = "gnomon data fashion-mnist"
NAME = "fashion-mnist"

# sha256 of what is inside the gzip files, whose headers differ from place to place.
FILES = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
CLASSES = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")

Arrays = tuple[np.ndarray, np.ndarray]


def fashion_mnist(folder: str | None = None) -> dict[str, Arrays]:
    """{"train": (x uint8 [60000, 28, 28, 1], y int32 [60000]), "test": (x [10000, 28, 28, 1], y [10000])}.

    Looks in `folder` if it is given, else where the Debian package and `fetch` put the files.

    Raises ValueError (one line): not there (the command that gets it is named), or a file with other content.
    """
    found = _found(folder)
    if found is None:
        raise ValueError(f"Fashion-MNIST is not in {', '.join(_places(folder))}; this gets it: {COMMAND}")
    files = [os.path.join(found, name) for name in FILES]
    for file in files:
        _verify(file)
    train, test = images_from_idx(files[0], files[1]), images_from_idx(files[2], files[3])
    return {"train": (train.x, train.y), "test": (test.x, test.y)}


def _places(folder: str | None) -> list[str]:
    return [folder] if folder else [SYSTEM_FOLDER, *(os.path.join(parent, NAME) for parent in data_folders())]


def _found(folder: str | None) -> str | None:
    complete = (place for place in _places(folder) if all(os.path.isfile(os.path.join(place, name)) for name in FILES))
    return next(complete, None)


def _verify(file: str) -> None:
    try:
        with gzip.open(file, "rb") as handle:
            given = hashlib.sha256(handle.read()).hexdigest()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file!r} is truncated or damaged ({error}); delete it and run: {COMMAND}") from None
    wanted = FILES[os.path.basename(file)]
    if given != wanted:
        raise ValueError(f"{file!r} holds sha256 {given[:16]}..., wanted {wanted[:16]}...; delete it and run: {COMMAND}")


def fetch(folder: str | None = None, say: Say = print) -> str:
    """Gets the four files into `folder` (default: fashion-mnist/ in the first writable of `data_folders`) and returns it: from
    the Debian package, which needs neither root nor an installation, else from the public mirror. Files are checked before they
    are put in place. Where they are already, intact, nothing is fetched.

    Raises ValueError (one line) naming why each way failed.
    """
    found = _found(folder)
    if found is not None:
        for name in FILES:
            _verify(os.path.join(found, name))
        say(f"Fashion-MNIST is in {found}, checksums right")
        return found
    target = writable_folder(NAME) if folder is None else made_writable(folder)
    reasons = []
    for way, get in WAYS.items():
        with tempfile.TemporaryDirectory(dir=target, prefix=".fetching-") as working:
            try:
                get(working, say)
                for name in FILES:
                    _verify(os.path.join(working, name))
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                reasons.append(f"{way}: {reason(error)}")
                say(reasons[-1])
                continue
            for name in FILES:
                os.replace(os.path.join(working, name), os.path.join(target, name))
        say(f"Fashion-MNIST is in {target}, checksums right")
        return target
    raise ValueError(f"Fashion-MNIST could not be fetched: {'; '.join(reasons)}")


def from_debian(working: str, say: Say) -> None:
    """The four files out of the Debian package, to `working`."""
    top = unpacked(PACKAGE, "31 MB", working, say)
    for name in FILES:
        os.replace(os.path.join(top, SYSTEM_FOLDER.lstrip("/"), name), os.path.join(working, name))


def from_mirror(working: str, say: Say) -> None:
    """Downloads the four files from the public mirror to `working`."""
    for name in FILES:
        say(f"{MIRROR}{name}")
        with urllib.request.urlopen(MIRROR + name, timeout=30) as response:
            content = response.read()
        with open(os.path.join(working, name), "wb") as handle:
            handle.write(content)


WAYS = {"Debian package": from_debian, "mirror": from_mirror}
