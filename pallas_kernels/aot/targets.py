"""The accelerators that are compiled for: how the compilers know them, and their limits."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Literal, NamedTuple

MIB = 2**20


class Target(NamedTuple):
    """`memory`: bytes of VMEM a core (TPU; from JAX's table in pallas/mosaic/tpu_info.py), or of shared memory that one block
    may ask for (GPU; "maximum shared memory per thread block" of the CUDA programming guide's table of compute capabilities).
    """

    name: str
    implementation: Literal["tpu", "gpu"]
    topology: str  # TPU: a topology that libtpu knows. GPU: XLA's description of the device
    memory: int
    delay_slots: int = 0  # TPU: bundles after a branch that are issued whether or not it is taken (see bundles.py)


def gpu(
    name: str,
    capability: tuple[int, int],
    cores: int,
    fpus: int,
    shared: int,
    optin: int,
    bandwidth: float,
    l2: int,
    memory: float,
) -> Target:
    """`shared`, `optin`: bytes of shared memory a multiprocessor, and that a block may have of it. The compiler minds the
    capability and the shared memory; cores, bandwidth (bytes a second), l2 and memory (bytes) only feed its cost model."""
    description = f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin}
          core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: 1.7
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          memory_bandwidth: {bandwidth:.0f} l2_cache_size: {l2} device_memory_size: {memory:.0f}
          cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 8 }}
        device_description_str: "NVIDIA {name}"
        """
    return Target(name, "gpu", description, optin)


# The slots were read off the dumps of libtpu 0.0.42: a loop's last branch stands so many bundles before the loop's end.
TARGETS = (
    Target("v5e", "tpu", "v5e:2x2", 128 * MIB, 4),
    Target("v5p", "tpu", "v5p:2x2x1", 64 * MIB, 4),
    Target("v6e", "tpu", "v6e:2x2", 128 * MIB, 4),
    Target("TPU7x", "tpu", "tpu7x:2x2x1", 64 * MIB, 6),
    gpu("A100", (8, 0), 108, 64, 167_936, 166_912, 2.039e12, 40 * MIB, 80e9),
    gpu("H100", (9, 0), 132, 128, 233_472, 232_448, 3.352e12, 50 * MIB, 80e9),
    gpu("B200", (10, 0), 148, 128, 233_472, 232_448, 8.0e12, 126 * MIB, 180e9),
)
QUICK = ("v5e", "TPU7x", "H100")  # the oldest and the newest TPU, and the GPU whose own instructions Mosaic GPU is for


def named(names: Sequence[str]) -> list[Target]:
    """The targets of these names, in the table's order. Raises ValueError for a name that is none."""
    known = {target.name.lower(): target for target in TARGETS}
    for name in names:
        if name.lower() not in known:
            near = difflib.get_close_matches(name.lower(), known, 1)
            meant = f"; did you mean {known[near[0]].name}?" if near else ""
            raise ValueError(f"no target {name!r}; there are: {', '.join(t.name for t in TARGETS)}{meant}")
    wanted = {name.lower() for name in names}
    return [target for target in TARGETS if target.name.lower() in wanted]
