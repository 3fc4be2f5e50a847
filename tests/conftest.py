"""What every test runs under: CPU, eight simulated devices, strict about ranks, repeatable.

The environment variables are for the processes that tests start, too; the devices are not: those see one CPU, as a user's do.
"""

from __future__ import annotations

import atexit
import gc
import itertools
import os
import shutil
import tempfile

gc.set_threshold(100_000, 50, 1000)  # traces are many long-lived objects, gone through at every collection
os.environ["JAX_PLATFORMS"] = "cpu"
for name in ("JAX_ENABLE_X64", "JAX_NUM_CPU_DEVICES", "JAX_DISABLE_JIT", "JAX_DEBUG_NANS", "JAX_DEFAULT_MATMUL_PRECISION"):
    os.environ.pop(name, None)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # set by the first process of a run, for its workers and what tests start
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="gnomon-tests-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
# Simulated devices wait for each other in a collective, and XLA aborts the process after 40 seconds of it: not enough where
# eight of them share two busy cores.
if "collective_call_terminate_timeout" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_collective_call_terminate_timeout_seconds=600"
os.environ.pop("MPLBACKEND", None)  # nor set here: in a notebook's kernel it would keep plots out of the notebook

# Tests mostly compile small programs that run once: here without XLA's emitters of fusions, which take a third of that time.
# The processes that tests start compile as a user's do.
THEIRS = os.environ["XLA_FLAGS"]
os.environ["XLA_FLAGS"] = f"{THEIRS} --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import matplotlib  # noqa: E402
import pytest  # noqa: E402

matplotlib.use("Agg")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.block_until_ready(jax.jit(lambda: 0)())  # XLA reads its flags here, once
os.environ["XLA_FLAGS"] = THEIRS

hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,  # the same examples in every run: a failure is there again, and CI is not a lottery
    database=None,
    deadline=None,  # a first example compiles, later ones do not
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config):
    """Compiling takes long: `make test` leaves out LLVM's optimizations, `make slow` and the processes that tests
    start do not."""
    jax.config.update("jax_disable_most_optimizations", config.option.markexpr == "not slow")


FINISHED = itertools.count(1)


def pytest_runtest_teardown():
    """Compiled programs stay mapped into memory in many pieces, and LLVM aborts the process that has Linux's 65,530 of them."""
    if next(FINISHED) % 5 == 0 and os.path.exists("/proc/self/maps"):
        with open("/proc/self/maps") as pieces:
            if sum(1 for _ in pieces) > 20_000:
                jax.clear_caches()


@pytest.fixture
def no_transfers():
    """Implicit transfers between host and device are errors in the test: what is jitted must be fed arrays already there."""
    with jax.transfer_guard("disallow"):
        yield
