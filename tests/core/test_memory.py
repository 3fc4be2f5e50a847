"""Freed memory is kept, which a step with large temporaries shows in its page faults."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SOURCE = """
import resource, sys
from research.core.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
import jax, jax.numpy as jnp
f = jax.jit(lambda x: (x[:, ::-1] @ x.T).sum())  # the reversed copy is a temporary of 48 MB
x = jnp.ones((64, 196608))
for _ in range(6):  # the heap grows to what two dispatches in flight need
    f(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    f(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is what is set")
def test_temporaries_of_a_step_are_not_mapped_anew():
    faults = {}
    for how in ("keep", "leave"):
        done = subprocess.run([sys.executable, "-c", SOURCE, how], cwd=REPO, capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout)
    assert faults["leave"] > 10_000 and faults["keep"] < faults["leave"] / 10
