"""Every member of the tree, found by the `example()` beside its factory."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from types import ModuleType

from research.core.types import Example

PACKAGES = ("tasks", "transforms", "estimates", "learners", "evals")
CONTRACTS = ("Task", "Estimate", "Learner", "Evaluator")


def is_factory(module: ModuleType) -> bool:
    """Whether the module's own function of its name makes a member. One that says it returns something else is a helper."""
    function = getattr(module, module.__name__.rpartition(".")[2], None)
    if not inspect.isfunction(function):
        return False
    returned = inspect.signature(function).return_annotation
    return returned is inspect.Signature.empty or str(returned).rpartition(".")[2].strip("'\">") in CONTRACTS


def public_modules(package: ModuleType) -> list[str]:
    """Modules of a package whose names have no underscore in front, by full name."""
    return sorted(f"{package.__name__}.{m.name}" for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


@functools.cache
def members() -> tuple[str, ...]:
    """ "tasks/language_model", …: every public module that makes a member or has an example()."""
    found = []
    for package in PACKAGES:
        for name in public_modules(importlib.import_module(f"research.{package}")):
            module = importlib.import_module(name)
            if is_factory(module) or hasattr(module, "example"):
                found.append(f"{package}/{name.rpartition('.')[2]}")
    return tuple(found)


@functools.cache
def example_of(member: str) -> Example:
    """The example of "package/module", made once."""
    return importlib.import_module(f"research.{member.replace('/', '.')}").example()
