"""The shape of the house: who may import whom (docs/design.md), how long a file may be, and what no tracked file may say.

Each check takes the root of a tree, so that the checks themselves are tried on trees with planted violations.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The arrows: a package, and what it may import beside itself. What is not listed here are the entry points and experiment.py:
# modules directly in research/, which may import everything (experiment.py: everything but the entry points).
BASE = {"core", "pallas_kernels"}
ARROWS: dict[str, set[str]] = {
    "pallas_kernels": set(),
    "core": {"pallas_kernels"},
    "nn": BASE,
    "models": BASE | {"nn"},
    "data": {"core"},
    "tasks": BASE | {"nn", "models", "data"},
    "transforms": {"core"},
    "estimates": {"core"},
    "optim": {"core"},
    "evals": {"core"},
    "theory": {"core"},
    "learners": {"core", "estimates", "optim"},
}
ABOVE = {"search", "plan", "deploy"}  # these may import all packages and experiment, but no entry point and not each other

# What is wrapped in one place: a package from outside, and the packages of research/ that may import it.
OUTSIDE = {"flax": {"nn", "models"}, "orbax": {"core"}, "grain": {"data"}, "tensorboard": {"core"}}

# The limits of files, in lines.
LONGEST = 500
LIMITS = {"research/core/loop.py": 300}
SOURCES = ("research", "pallas_kernels", "configs", "tests", "benchmarks", "scripts")

# What ties a file to one machine or one way to reach packages. Written so that this file does not contain what it looks for.
UNWANTED = {
    "a path of one machine": re.compile(r"(?<![\w.~$}/-])/(?:home|root|Users|work|opt|tmp)/[\w.]"),
    "a package registry's address": re.compile(r"\bpypi\.(?:org|python)|pythonhoste[d]\.|https?://[\w.]*\bpypi\b"),
}
SKIPPED = {".git", "runs", "__pycache__", "build", "dist"}


class Import(NamedTuple):
    """`target` is dotted: of a `from x import y`, x.y (y may be a module)."""

    line: int
    target: str


def imports(source: str, module: str, is_package: bool = False) -> Iterator[Import]:
    """Every import in a module, inside functions and `if TYPE_CHECKING` included, relative ones resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (Import(node.lineno, f"{base}.{alias.name}") for alias in node.names)


def modules(root: Path) -> Iterator[tuple[Path, str]]:
    """(path from the root, dotted name) of every module in the two packages."""
    for package in ("research", "pallas_kernels"):
        for path in sorted((root / package).rglob("*.py")):
            relative = path.relative_to(root)
            if not SKIPPED & set(relative.parts):
                yield relative, ".".join(relative.with_suffix("").parts).removesuffix(".__init__")


def place(dotted: str, root: Path) -> str | None:
    """Where a name belongs: a package, "experiment", "entry" (the other modules in research/), or None: outside."""
    parts = dotted.split(".")
    if parts[0] == "pallas_kernels":
        return "pallas_kernels"
    if parts[0] != "research":
        return None
    if len(parts) > 1 and (root / "research" / parts[1]).is_dir():
        return parts[1]
    return "experiment" if parts[1:2] == ["experiment"] else "entry"


def allowed(importer: str, packages: set[str]) -> set[str]:
    if importer == "entry":
        return packages | {"entry", "experiment"}
    if importer == "experiment":
        return packages
    if importer in ABOVE:
        return (packages - ABOVE) | {importer, "experiment"}
    if importer not in ARROWS:
        raise LookupError(f"research/{importer}/ is not in ARROWS (tests/test_arrows.py): say there what it may import")
    return ARROWS[importer] | {importer}


def wrong_imports(root: Path) -> list[str]:
    found = []
    packages = {path.name for path in (root / "research").iterdir() if path.is_dir()} | {"pallas_kernels"}
    for path, name in modules(root):
        importer = place(name, root)
        assert importer is not None
        if path.name == "__main__.py" and len(path.parts) > 2:
            importer = "entry"  # a verb that shares its name with a package
        for line, target in imports((root / path).read_text(), name, path.name == "__init__.py"):
            to = place(target, root)
            if to is None:
                outside = OUTSIDE.get(target.split(".")[0])
                if outside is not None and importer not in outside:
                    where = " and ".join(f"research/{package}/" for package in sorted(outside))
                    found.append(f"{path}:{line}: imports {target}; {target.split('.')[0]} is used in {where} only")
            elif to not in allowed(importer, packages):
                may = ", ".join(sorted(allowed(importer, packages) - {importer})) or "nothing else of this project"
                found.append(f"{path}:{line}: {importer} imports {target}; it may import: {may}")
    return found


def long_files(root: Path) -> list[str]:
    found = []
    for folder in SOURCES:
        for path in sorted((root / folder).rglob("*.py")):
            relative = path.relative_to(root)
            if SKIPPED & set(relative.parts):
                continue
            lines, limit = len(path.read_text().splitlines()), LIMITS.get(relative.as_posix(), LONGEST)
            if lines > limit:
                found.append(f"{relative}: {lines} lines, {limit} allowed; split it along an idea")
    return found


def prints(root: Path) -> list[str]:
    """Calls of print in packages, but to a named stream. Verbs talk to people: modules in research/, every __main__.py."""
    found = []
    for path, _ in modules(root):
        if path.name == "__main__.py" or (path.parts[0] == "research" and len(path.parts) == 2):
            continue
        for node in ast.walk(ast.parse((root / path).read_text())):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            if called and not any(keyword.arg == "file" for keyword in node.keywords):
                found.append(f"{path}:{node.lineno}: print in a library module; return it, or raise or log it")
    return found


def kept_files(root: Path) -> list[Path]:
    """The tracked files; without git, or outside a repository, every file that is no tool's."""
    if (root / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
        return [Path(name) for name in listed.split("\0") if name and (root / name).is_file()]
    files = [path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file()]
    return [path for path in files if not any(p in SKIPPED or p.startswith((".venv", ".coverage")) for p in path.parts)]


def unwanted_words(root: Path) -> list[str]:
    found = []
    for path in kept_files(root):
        text = (root / path).read_bytes()
        if b"\0" in text:
            continue
        for number, line in enumerate(text.decode("utf-8", "replace").splitlines(), 1):
            for what, words in UNWANTED.items():
                if words.search(line):
                    found.append(f"{path}:{number}: {what}: {line.strip()[:100]}")
    return found


CHECKS = {"imports": wrong_imports, "lengths": long_files, "prints": prints, "words": unwanted_words}


@pytest.mark.parametrize("name", CHECKS)
def test_the_house_is_in_order(name):
    found = CHECKS[name](ROOT)
    assert not found, "\n" + "\n".join(found)


# The checks are worth something: each planted violation is seen, each allowed neighbour of it is not.


def tree(root: Path, files: dict[str, str]) -> Path:
    for name in {*ARROWS, "plan", "search"} - {"pallas_kernels"}:
        (root / "research" / name).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


VIOLATIONS = [
    ("imports", "research/core/x.py", "from research.nn import attention", "core imports research.nn.attention"),
    ("imports", "research/core/x.py", "def f():\n    import research.models.mlp", ":2: core imports research.models.mlp"),
    ("imports", "research/core/x.py", "from ..nn import attention", "core imports research.nn.attention"),
    ("imports", "research/core/__init__.py", "from .. import tasks", "core imports research.tasks"),
    ("imports", "research/core/x.py", "import research", "core imports research;"),
    ("imports", "research/core/x.py", "from research.train import main", "core imports research.train.main"),
    ("imports", "research/nn/x.py", "from research.models import mlp", "nn imports"),
    ("imports", "research/transforms/x.py", "if TYPE_CHECKING:\n    from research.tasks import t", "transforms imports"),
    ("imports", "research/learners/x.py", "from research.transforms import maml", "learners imports"),
    ("imports", "research/data/x.py", "from research.tasks import t", "data imports"),
    ("imports", "research/plan/x.py", "from research.search import s", "plan imports"),
    ("imports", "research/plan/x.py", "from research import train", "plan imports research.train"),
    ("imports", "research/experiment.py", "from research import train", "experiment imports research.train"),
    ("imports", "pallas_kernels/x.py", "from research.core import types", "pallas_kernels imports research.core.types"),
    ("imports", "research/tasks/x.py", "from flax import nnx", "flax is used in research/models/ and research/nn/ only"),
    ("imports", "research/train.py", "import orbax.checkpoint", "orbax is used in research/core/ only"),
    ("lengths", "research/nn/x.py", "x = 0\n" * 501, "501 lines, 500 allowed"),
    ("lengths", "research/core/loop.py", "x = 0\n" * 301, "301 lines, 300 allowed"),
    ("prints", "research/nn/x.py", "def f():\n    print(1)", "research/nn/x.py:2"),
    ("words", "docs/x.md", "see /ho" + "me/ada/runs", "docs/x.md:1: a path of one machine"),
    ("words", "Makefile", "\npip install --target=/wo" + "rk/x", "Makefile:2: a path of one machine"),
    ("words", "requirements/x.txt", "--index-url https://py" + "pi.org/simple", "a package registry's address"),
    ("words", "requirements/x.txt", "https://files.python" + "hosted.org/p", "a package registry's address"),
]


@pytest.mark.parametrize(("check", "file", "text", "said"), VIOLATIONS, ids=range(len(VIOLATIONS)))
def test_a_planted_violation_is_seen(tmp_path, check, file, text, said):
    found = CHECKS[check](tree(tmp_path, {file: text}))
    assert len(found) == 1 and said in found[0], found


ORDERLY = {
    "research/core/x.py": "import jax\nfrom research.core import y\nfrom . import y\nfrom .y import z",
    "research/core/loop.py": "x = 0\n" * 300,
    "research/nn/x.py": "from flax import nnx\nimport pallas_kernels\nfrom ..core import types\n" + "x = 0\n" * 497,
    "research/nn/printer.py": "from rich import print_json\nconsole.print(1)\nprint(1, file=out)",
    "research/tasks/x.py": "from research.data import text\nfrom research.models import mlp",
    "research/learners/x.py": "from research.estimates.exact import exact\nfrom research.optim import muon",
    "research/plan/x.py": "from research.experiment import build",
    "research/plan/__main__.py": "from research import train\nprint(1)",
    "research/experiment.py": "from research.tasks import t\nfrom research.plan import p",
    "research/train.py": "from research.experiment import build\nfrom research import evaluate\nprint(1)",
    "docs/x.md": "runs/home/x, https://example.org/work/x, ~/tmp/x, /usr/share/x, $HOME/work/x, at work/home",
    "data.npz": "\0 /ho" + "me/ada/x",
}


@pytest.mark.parametrize("check", CHECKS)
def test_an_orderly_tree_passes(tmp_path, check):
    assert CHECKS[check](tree(tmp_path, ORDERLY)) == []


def test_a_new_package_must_say_what_it_may_import(tmp_path):
    with pytest.raises(LookupError, match="research/novel/ is not in ARROWS"):
        wrong_imports(tree(tmp_path, {"research/novel/x.py": "from research.core import types"}))
