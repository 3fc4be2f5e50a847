"""Compiles for a TPU that is not here: libtpu through jax.experimental.topologies, with its dump of the final schedule.

VMEM bytes are those that the compiler's own result names for the kernel's custom call: the end of `used_scoped_memory_configs`
less the offset of `scoped_memory_configs`, in memory space 1. They are the kernel's windows, twice where they are
double-buffered, and its scratch: the sum of the dump's scoped VMEM allocations without the compiler's internal scratch (36 KiB
on v5e and v5p, 72 KiB since). Operands that XLA chose to keep in VMEM around the call are not among them. A kernel that needs
more than the compiler gives is refused by it ("would exceed memory"); targets.py has what a core has.
"""

from __future__ import annotations

import re
from pathlib import Path

from pallas_kernels.aot import bundles
from pallas_kernels.aot.device import Device
from pallas_kernels.aot.results import Call, Counts
from pallas_kernels.aot.targets import Target
from pallas_kernels.cases import Build

VMEM = "1"  # the memory space's number in HLO
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = ", re.MULTILINE)
SCOPES = re.compile(r'"(used_)?scoped_memory_configs":\[([^\]]*)\]')
SCOPE = re.compile(rf'"memory_space":"{VMEM}","offset":"(\d+)","size":"(\d+)"')


def environment(dump: Path) -> dict[str, str]:
    """What must be set before libtpu is loaded. Spaces in the folder's name would end the flag."""
    flags = [f"--xla_jf_dump_to={dump}", "--xla_jf_dump_llo_text=true", "--xla_jf_dump_llo_pass_label_regex=^final_"]
    return {
        "JAX_PLATFORMS": "cpu",  # the host stays a CPU; libtpu is only asked to compile
        "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask what machine this is
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # its lock is for a chip, and there is none to be shared
        "LIBTPU_INIT_ARGS": " ".join(flags),
    }


class Compiler:
    """For one target, in a process that has `environment`."""

    def __init__(self, target: Target, dump: Path):
        import jax
        import libtpu
        from jax.experimental import topologies

        self.target, self.dump = target, dump
        self.device = Device(topologies.get_topology_desc(platform="tpu", topology_name=target.topology))
        self.versions = {"jax": jax.__version__, "libtpu": libtpu.__version__}

    def compile(self, build: Build) -> tuple[float, tuple[Call, ...]]:
        """Seconds of lowering and compilation, and the Pallas kernels found in the result."""
        for path in self.dump.iterdir():
            path.unlink()
        seconds, hlo = self.device.compile(build)
        return seconds, tuple(Call(name, memory, self.counts(name)) for name, memory in kernels(hlo).items())

    def counts(self, name: str) -> Counts:
        def dumped(what: str) -> str:
            pattern = re.compile(rf"\d+-{re.escape(name)}-\d+-{what}\.txt")
            paths = sorted(path for path in self.dump.iterdir() if pattern.fullmatch(path.name))
            if not paths:
                raise ValueError(f"the compiler dumped no {what} of {name}")
            return paths[-1].read_text(errors="replace")

        schedule = bundles.schedule(dumped("final_bundles"), self.target.delay_slots)
        return bundles.count(schedule, bundles.use(dumped("final_hlo-static-per-bundle-utilization")))


def kernels(hlo: str) -> dict[str, int | None]:
    """Name -> bytes of VMEM of every Pallas kernel in a compiled module's text."""
    starts = list(INSTRUCTION.finditer(hlo))
    ends = [*(found.start() for found in starts[1:]), len(hlo)]
    result: dict[str, int | None] = {}
    for found, end in zip(starts, ends):
        text = hlo[found.start() : end]
        if 'custom_call_target="tpu_custom_call"' in text:
            scopes = {used: SCOPE.search(listed) for used, listed in SCOPES.findall(text)}
            used, given = scopes.get("used_"), scopes.get("")
            start = int(given[1]) if given else 0
            result[found[1]] = int(used[1]) + int(used[2]) - start if used else None
    return result
