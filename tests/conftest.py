"""What every test runs under: CPU, eight simulated devices, strict about ranks, repeatable.

The environment variables are for the processes that tests start, too; the devices are not: those see one CPU, as a user's do.
"""

from __future__ import annotations

import gc
import os

gc.set_threshold(100_000, 50, 1000)  # traces are many long-lived objects, gone through at every collection
os.environ["JAX_PLATFORMS"] = "cpu"
for name in ("JAX_ENABLE_X64", "JAX_NUM_CPU_DEVICES", "JAX_DISABLE_JIT", "JAX_DEBUG_NANS", "JAX_DEFAULT_MATMUL_PRECISION"):
    os.environ.pop(name, None)
os.environ.pop("MPLBACKEND", None)  # nor set here: in a notebook's kernel it would keep plots out of the notebook

import hypothesis  # noqa: E402
import jax  # noqa: E402
import matplotlib  # noqa: E402
import pytest  # noqa: E402

matplotlib.use("Agg")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

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


@pytest.fixture
def no_transfers():
    """Implicit transfers between host and device are errors in the test: what is jitted must be fed arrays already there."""
    with jax.transfer_guard("disallow"):
        yield
