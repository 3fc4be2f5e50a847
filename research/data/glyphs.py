"""Letters of many scripts, for few-shot learning without a download: an alphabet is a script, a class is one of its characters,
a drawer is a typeface and an affine warp. In the manner of Omniglot (Lake et al. 2015): 28 x 28, 20 drawings a character.

They are rendered from the Noto fonts, which Debian packages as fonts-noto-core, once: what is rendered is kept in the folder of
fetched data, under a name made of the sha256 of the fonts. Scripts are split by name, so that a test script
is seen in no training; some of its letters may look like those of a script that is, as Greek capitals do like Latin ones.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import subprocess
import tempfile
import unicodedata
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from research.data.arrays import DAMAGED
from research.data.debian import Say, reason, unpacked
from research.data.determinism import digest, mixed
from research.data.folder import data_folders, made_writable, writable_folder

PACKAGE, INSIDE = "fonts-noto-core", "usr/share/fonts/truetype/noto"
FONTS = "noto-fonts"
COMMAND = f"gnomon data {FONTS}"
FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "~/Library/Fonts",
    "/Library/Fonts",
)
NAME = "glyphs"
VERSION = 1  # raised when the same fonts begin to give other images

SIZE, DRAWERS = 28, 20
INK = 20  # pixels of a letter's longer side, before the warp
SCRIPTS = 50  # fewer are no use: some parts of the split would have none
FEWEST, MOST = 14, 30  # characters of a script; of more, the first by code point
EM = 64  # pixels that letters are rendered at before they are warped
# Degrees of rotation, shear, scales of height and width, pixels: each drawn uniformly, the first, second and last both ways.
ROTATION, SHEAR, SCALE, SHIFT = 15.0, 0.25, (0.75, 1.1), 2.5

# Noto<kind><Script>-<weight>.ttf; a kind alone holds Latin, Greek and Cyrillic.
FILE = re.compile(r"Noto(?:Sans|Serif|Kufi|Naskh|Rashi|Looped|Traditional)([A-Z]\w*|)-(?:Regular|Bold)\.ttf")
COMMON = ("Latin", "Greek", "Cyrillic")
# Unicode names begin with the script's, but for these.
UNICODE_NAMES = {
    "CanadianAboriginal": "CANADIANSYLLABICS",
    "AnatolianHieroglyphs": "ANATOLIANHIEROGLYPH",
    "EgyptianHieroglyphs": "EGYPTIANHIEROGLYPH",
}
LETTERS = ("Lu", "Ll", "Lo")


class Glyphs(NamedTuple):
    """images: uint8 [classes, drawers, 28, 28], ink 255. scripts: the script of each class. characters: what it shows."""

    images: np.ndarray
    scripts: tuple[str, ...]
    characters: tuple[str, ...]

    def part(self, name: str) -> Glyphs:
        """The classes whose scripts are in "train", "validation" or "test"."""
        rows = [i for i, script in enumerate(self.scripts) if part_of(script) == name]
        return Glyphs(self.images[rows], *(tuple(held[i] for i in rows) for held in (self.scripts, self.characters)))


def part_of(script: str) -> str:
    """By the sha256 of a script's name: two in ten "test", one "validation", the others "train"."""
    residue = int(hashlib.sha256(script.encode()).hexdigest(), 16) % 10
    return "test" if residue < 2 else "validation" if residue == 2 else "train"


def glyphs(folder: str | None = None) -> Glyphs:
    """All letters of the Noto fonts below `folder`, by default where `fetch` puts them, else the first of the system's and the
    user's folders that has some.

    Raises ValueError (one line, with what to install) where there are none.
    """
    places = _places(folder)
    fonts = next((fonts for fonts in map(_noto, places) if len(fonts) >= SCRIPTS), None)
    if fonts is None:
        raise ValueError(
            f"no Noto fonts of {SCRIPTS} scripts in {', '.join(places)}; install {PACKAGE} (Debian, Ubuntu), or run: {COMMAND}"
        )
    name = f"v{VERSION}-{_contents(fonts)}.npz"
    kept = [os.path.join(parent, NAME, name) for parent in data_folders()]
    found = next(filter(None, map(_kept, kept)), None)
    if found is None:
        found = rendered(fonts)
        _keep(found, name)
    return found


def _places(folder: str | None) -> list[str]:
    return [folder] if folder else [*(os.path.join(parent, FONTS) for parent in data_folders()), *FOLDERS]


def fetch(folder: str | None = None, say: Say = print) -> str:
    """Puts the Noto fonts into `folder` (default: noto-fonts/ in the first writable of `data_folders`) and returns it: out of
    the Debian package, which needs neither root nor an installation. Where they are already, nothing is fetched.

    Raises ValueError (one line) naming why it failed.
    """
    for place in _places(folder):
        if len(_noto(place)) >= SCRIPTS:
            say(f"Noto fonts are in {place}")
            return place
    target = writable_folder(FONTS) if folder is None else made_writable(folder)
    with tempfile.TemporaryDirectory(dir=target, prefix=".fetching-") as working:
        try:
            top = os.path.join(unpacked(PACKAGE, "12 MB", working, say), INSIDE)
            for name in os.listdir(top):
                os.replace(os.path.join(top, name), os.path.join(target, name))
        except (OSError, subprocess.SubprocessError) as error:
            raise ValueError(f"Noto fonts could not be fetched: {reason(error)}; another way: notofonts.github.io") from None
    say(f"Noto fonts are in {target}")
    return target


def _noto(top: str) -> dict[str, list[str]]:
    """{script: its font files, sorted by name} below a folder."""
    found = glob.glob(os.path.join(os.path.expanduser(top), "**", "Noto*.ttf"), recursive=True)
    files = {os.path.basename(file): file for file in found}
    named = {file: match[1] for file in sorted(files) if (match := FILE.fullmatch(file))}
    bare = sorted(set(named.values()) - {""}, key=len)
    fonts: dict[str, list[str]] = {}
    for file, name in named.items():
        # AdlamUnjoined is another face of Adlam
        for script in [next(s for s in bare if name.startswith(s))] if name else COMMON:
            fonts.setdefault(script, []).append(files[file])
    return fonts


def _contents(fonts: Mapping[str, Sequence[str]]) -> str:
    hashes = {}
    for file in sorted({file for files in fonts.values() for file in files}):
        with open(file, "rb") as handle:
            hashes[os.path.basename(file)] = hashlib.sha256(handle.read()).hexdigest()
    return digest(VERSION, sorted(hashes.items()))


def rendered(fonts: Mapping[str, Sequence[str]]) -> Glyphs:
    """The letters of {script: font files}, script by script and by code point. Scripts of fewer than 14 are left out, and
    letters that look like one before them, or whose capital is there."""
    images: list[np.ndarray] = []
    scripts: list[str] = []
    characters: list[str] = []
    for script in sorted(fonts):
        letters = _letters(script, fonts[script])
        if len(letters) >= FEWEST:
            images += [_drawn(faces, script, letter) for letter, faces in letters.items()]
            scripts += [script] * len(letters)
            characters += letters
    if not images:
        raise ValueError(f"fonts of {', '.join(fonts)}: none holds {FEWEST} letters of its script")
    return Glyphs(np.stack(images), tuple(scripts), tuple(characters))


def _letters(script: str, files: Sequence[str]) -> dict[str, list[np.ndarray]]:
    """{character: its bitmap in each of the files that have it}."""
    from matplotlib.ft2font import FT2Font  # half a second, and only where something is rendered
    from PIL import ImageFont

    begin = UNICODE_NAMES.get(script, script.upper())
    maps = [FT2Font(file).get_charmap() for file in files]
    faces = [ImageFont.truetype(file, EM, layout_engine=ImageFont.Layout.BASIC) for file in files]
    found: dict[str, list[np.ndarray]] = {}
    seen: set[bytes] = set()
    for code in sorted(set().union(*maps)):
        letter = chr(code)
        name = unicodedata.name(letter, "")
        capital = letter.upper()
        if unicodedata.category(letter) not in LETTERS or " WITH " in name or (capital != letter and capital in found):
            continue
        if not re.sub("[ -]", "", name).startswith(begin):
            continue
        bitmaps = [
            bitmap for held, face in zip(maps, faces, strict=True) if code in held and (bitmap := _bitmap(face, letter)).size
        ]
        looks = digest(bitmaps[0]).encode() if bitmaps else b""
        if bitmaps and looks not in seen:
            seen.add(looks)
            found[letter] = bitmaps
        if len(found) == MOST:
            break
    return found


def _bitmap(face, letter: str) -> np.ndarray:
    """uint8 [height, width], cut to its ink; empty where there is none."""
    mask = face.getmask(letter)
    pixels = np.asarray(mask, np.uint8).reshape(mask.size[::-1])
    rows, columns = (np.flatnonzero(pixels.any(axis)) for axis in (1, 0))
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] if len(rows) else np.zeros((0, 0), np.uint8)


def _drawn(faces: Sequence[np.ndarray], script: str, letter: str) -> np.ndarray:
    """uint8 [DRAWERS, SIZE, SIZE]: the faces in turn, each warped by numbers that depend on script, letter and drawer alone."""
    raw = np.random.Philox(key=mixed(VERSION, *script.encode(), ord(letter))).random_raw(DRAWERS * 6)
    u = (raw / 2.0**64).reshape(DRAWERS, 6)
    angle = np.deg2rad(ROTATION * (2 * u[:, 0] - 1))
    shear = SHEAR * (2 * u[:, 1] - 1)
    sizes = SCALE[0] + (SCALE[1] - SCALE[0]) * u[:, 2:4]
    shift = SHIFT * (2 * u[:, 4:6] - 1)
    turn = np.stack([np.stack([np.cos(angle), -np.sin(angle)], -1), np.stack([np.sin(angle), np.cos(angle)], -1)], -2)
    slant = np.tile(np.eye(2), (DRAWERS, 1, 1))
    slant[:, 1, 0] = shear
    back = np.linalg.inv(turn @ slant * sizes[:, None, :])  # a place on the page, (row, column), to one on the letter
    out = np.empty((DRAWERS, SIZE, SIZE), np.uint8)
    for d in range(DRAWERS):
        face = np.pad(faces[d % len(faces)], 2)
        out[d] = _warped(face, back[d] * ((max(face.shape) - 4) / INK), shift[d])
    return out


def _warped(face: np.ndarray, back: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """The page [SIZE, SIZE] whose place p, from its middle, shows that of the letter at back @ (p - shift) from its own; the
    mean of four bilinear samples a pixel."""
    from PIL import Image

    back = back / 2  # of samples, two a pixel each way
    begin = np.asarray(face.shape) / 2 - back @ (SIZE + 2 * shift)
    # PIL counts columns before rows
    matrix = (back[1, 1], back[1, 0], begin[1], back[0, 1], back[0, 0], begin[0])
    fine = Image.fromarray(face).transform((2 * SIZE, 2 * SIZE), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(fine.reduce(2))


def _keep(held: Glyphs, name: str) -> None:
    """Puts them where `_kept` finds them; where no folder can be written to, they are rendered anew next time."""
    try:
        folder = writable_folder(NAME)
    except ValueError:
        return
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".npz", delete=False) as out:
        np.savez_compressed(out, images=held.images, scripts=np.asarray(held.scripts), characters=np.asarray(held.characters),
                            sha256=np.asarray(_hash(held)))  # fmt: skip
    os.chmod(out.name, 0o644)  # a temporary file is its owner's alone
    os.replace(out.name, os.path.join(folder, name))


def _hash(held: Glyphs) -> str:
    return digest(held.images, held.scripts, held.characters)


def _kept(path: str) -> Glyphs | None:
    """What was kept there; None where there is nothing, or it is not what was kept."""
    if not os.path.isfile(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            held = Glyphs(archive["images"], *(tuple(map(str, archive[name])) for name in ("scripts", "characters")))
            return held if str(archive["sha256"]) == _hash(held) else None
    except (*DAMAGED, KeyError):
        return None
