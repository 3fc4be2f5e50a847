"""Freed memory is kept, which a step with large temporaries shows in its page faults."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SOURCE = """
import resource, statistics, sys
from research.core.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
import jax, jax.numpy as jnp
f = jax.jit(lambda x: (x[:, ::-1] @ x.T).sum())  # the reversed copy is a temporary of 48 MB
x = jnp.ones((64, 196608))
faults = []
for _ in range(60):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    f(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
# the first 25 or so may grow the heap, when a dispatch overtakes the end of the one before
print(int(statistics.median(faults[-15:])))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is what is set")
@pytest.mark.slow
def test_temporaries_of_a_step_are_not_mapped_anew():
    faults = {}  # of a call, the median of the last 15
    for how in ("keep", "leave"):
        done = subprocess.run([sys.executable, "-c", SOURCE, how], cwd=REPO, capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout)
    assert faults["leave"] > 10_000 and faults["keep"] < faults["leave"] / 10
