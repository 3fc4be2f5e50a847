"""What the contract suite runs under."""

from __future__ import annotations

import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def quick_to_compile(pytestconfig):
    """Properties compare one program with another: in `make slow` too they want no optimizations of LLVM, which take longer
    than all that is computed here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", pytestconfig.option.markexpr == "not slow")
