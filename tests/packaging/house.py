"""A small checkout with the real scripts, whose lock names tiny wheels in a folder: set-up from end to end, offline."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# A build backend in a few lines, so that the editable install needs nothing from an index.
BACKEND = """
import os, zipfile

def build_editable(folder, config_settings=None, metadata_directory=None):
    name = "gnomon-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(folder, name), "w") as wheel:
        wheel.writestr("gnomon.pth", os.getcwd() + "\\n")
        wheel.writestr("gnomon-0.1.0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: gnomon\\nVersion: 0.1.0\\n")
        wheel.writestr("gnomon-0.1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("gnomon-0.1.0.dist-info/RECORD", "")
    return name
"""
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "gnomon"
version = "0.1.0"
"""


def wheel(folder: Path, name: str, version: str = "1.0") -> str:
    """Writes a wheel of one module; gives the line that locks it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    files = {
        f"{name}.py": f"version = {version!r}\n",
        f"{name}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{name}-{version}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{name}-{version}.dist-info/RECORD"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
        archive.writestr(record, "".join(f"{file},,\n" for file in [*files, record]))
    return f"{name}=={version} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


def checkout(root: Path) -> Path:
    (root / "scripts").mkdir(parents=True)
    (root / "requirements").mkdir()
    (root / "research").mkdir()
    for script in ("setup", "environment.py"):
        shutil.copy(ROOT / "scripts" / script, root / "scripts" / script)
    (root / "backend.py").write_text(BACKEND)
    (root / "pyproject.toml").write_text(PYPROJECT)
    (root / "setup.py").write_text("")
    (root / "research" / "__init__.py").write_text("")
    (root / "requirements" / "lock.txt").write_text(wheel(root / "wheels", "jax") + wheel(root / "wheels", "numpy"))
    return root


def offline(root: Path, **more: str) -> dict[str, str]:
    """The environment for a set-up there: pip sees the folder of wheels and no index."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHON", "COV_", "COVERAGE_"))}
    # pip takes a URL for a folder whose name may hold spaces
    return {**kept, "PYTHON": base_python(), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": (root / "wheels").as_uri(), **more}


def base_python() -> str:
    """The interpreter outside the environment that the tests run in."""
    return getattr(sys, "_base_executable", sys.executable)


def set_up(root: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [root / "scripts" / "setup", *arguments], env=environment, capture_output=True, text=True, timeout=240, cwd=root.parent
    )
