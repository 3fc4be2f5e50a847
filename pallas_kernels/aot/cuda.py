"""Compiles for a GPU that is not here: XLA's CUDA compiler with a description in place of the device, then ptxas once more.

Both ways of Pallas end in PTX: Triton's in XLA's own dump, Mosaic GPU's, which is compiled inside of XLA's custom call, where
MOSAIC_GPU_DUMP_TO points. Registers and spills are those that ptxas -v gives for that PTX. Shared memory is what a block asks
for at its launch: with Triton by XLA's sequence of thunks, and the static part that ptxas names; with Mosaic GPU by its IR.
"""

from __future__ import annotations

import re
from pathlib import Path

from pallas_kernels.aot import ptx
from pallas_kernels.aot.device import Device
from pallas_kernels.aot.results import Call
from pallas_kernels.aot.targets import Target
from pallas_kernels.cases import Build

TRITON = re.compile(r'custom_call_target="__gpu\$xla\.gpu\.triton".*?\bname = "([^"]+)"')
LAUNCH = re.compile(r"kCustomKernel\b.*?\]\s+(\S+) grid: .*shared_memory: (\d+) bytes")
DYNAMIC = re.compile(r"dynamic_shared_memory_size (%[\w$.-]+)")


def environment(dump: Path) -> dict[str, str]:
    """What must be set before jax is imported. The two compilers' dumps are kept apart."""
    return {
        "JAX_PLATFORMS": "cpu",  # the host stays a CPU; the CUDA plugin is only asked to compile
        "XLA_FLAGS": f"--xla_dump_to={dump / 'xla'}",
        "MOSAIC_GPU_DUMP_TO": str(dump / "mosaic"),
    }


class Compiler:
    """For one target, in a process that has `environment`."""

    def __init__(self, target: Target, dump: Path):
        import jax
        from jax.experimental import topologies

        self.folders = [dump / "xla", dump / "mosaic"]
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name=target.name, topology="1x1x1", target_config=target.topology
        )
        self.device = Device(topology)
        self.ptxas = ptx.assembler()
        self.versions = {"jax": jax.__version__, "ptxas": ptx.version(self.ptxas)}

    def compile(self, build: Build) -> tuple[float, tuple[Call, ...]]:
        """Seconds of lowering and compilation, and the Pallas kernels found in the result."""
        for folder in self.folders:
            folder.mkdir(exist_ok=True)
            for path in folder.iterdir():
                path.unlink()
        seconds, hlo = self.device.compile(build)
        return seconds, tuple(self.triton(hlo) + self.mosaic())

    def triton(self, hlo: str) -> list[Call]:
        """XLA's own kernels are in its dump too; Pallas's are those that the compiled module calls by name."""
        names = set(TRITON.findall(hlo))
        if not names:
            return []
        launched: dict[str, int] = {}
        assembled: dict[str, ptx.Assembled] = {}
        for path in sorted(self.folders[0].glob("*thunk_sequence.txt")):
            for name, size in launches(path.read_text()).items():
                if name in names or re.sub(r"_+\d+$", "", name) in names:
                    launched[name] = size
        for path in sorted(self.folders[0].glob("*.ptx")):
            if path.stat().st_size:
                assembled.update(ptx.assemble(self.ptxas, path))
        lacking = sorted({*(names - set(launched)), *(set(launched) - set(assembled))})
        if lacking:
            raise ValueError(f"the compiler dumped no launch or no PTX of {lacking[0]}")
        return [call(name, shared, assembled[name]) for name, shared in launched.items()]

    def mosaic(self) -> list[Call]:
        found = []
        for path in sorted(self.folders[1].glob("*.ptx")):
            log = path.with_suffix(".mlir-passes.log")
            for name, assembled in ptx.assemble(self.ptxas, path).items():
                # What ptxas calls static is one byte that stands for the dynamic part.
                shared = dynamic(log.read_text())
                found.append(call(name.removesuffix("_mosaic_gpu_kernel"), shared, assembled._replace(shared=0)))
        return found


def call(name: str, shared: int, assembled: ptx.Assembled) -> Call:
    memory = shared + assembled.shared
    return Call(name, memory, registers=assembled.registers, spills=assembled.spills, notes=assembled.notes)


def launches(thunks: str) -> dict[str, int]:
    """Name -> bytes of dynamic shared memory a block, of the custom kernels in XLA's sequence of thunks."""
    return {name: int(shared) for name, shared in LAUNCH.findall(thunks)}


def dynamic(log: str) -> int:
    """Bytes of dynamic shared memory with which Mosaic GPU launches a kernel, from its IR before the first pass."""
    launch = DYNAMIC.search(log)
    if launch is None:
        raise ValueError("the dump of Mosaic GPU does not say how much shared memory is asked for")
    constant = re.findall(rf"{re.escape(launch[1])} = arith\.constant (\d+) : i32", log[: launch.start()])
    if not constant:
        raise ValueError("the shared memory that is asked for is no constant")
    return int(constant[-1])
