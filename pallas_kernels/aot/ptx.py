"""What NVIDIA's assembler says of a kernel: registers, spills, static shared memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

TARGET = re.compile(r"^\.target (sm_\w+)", re.MULTILINE)


class Assembled(NamedTuple):
    """`registers`: a thread. `spills`: bytes of spill stores a thread. `shared`: bytes of static shared memory a block."""

    registers: int
    spills: int
    shared: int
    notes: tuple[str, ...]


def assembler() -> Path:
    """ptxas: that of the package beside JAX where there is one (the version is locked), of the PATH otherwise."""
    from jax._src.lib import cuda_path  # the folder of nvidia-cuda-nvcc that JAX itself compiles with

    packaged = Path(cuda_path) / "bin" / "ptxas" if cuda_path else None
    if packaged is not None and packaged.is_file():
        return packaged
    found = shutil.which("ptxas")
    if found is None:
        raise FileNotFoundError("there is no ptxas: neither the package nvidia-cuda-nvcc nor one on the PATH")
    return Path(found)


def version(ptxas: Path) -> str:
    said = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\bV(\d[\d.]*)", said)
    return found[1] if found else "unknown"


def assemble(ptxas: Path, source: Path) -> dict[str, Assembled]:
    """By name, every kernel in a PTX file."""
    arch = TARGET.search(source.read_text())
    if arch is None:
        raise ValueError(f"{source.name} does not say what it is for")
    command = [ptxas, "-v", f"-arch={arch[1]}", source, "-o", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        wrong = [line for line in done.stderr.splitlines() if re.match(r"ptxas.*(error|fatal)", line)]
        raise ValueError((wrong or [f"ptxas ended with code {done.returncode}"])[0])
    return parsed(done.stderr)


def parsed(said: str) -> dict[str, Assembled]:
    """Reads the output of ptxas -v; there may be no kernel in it. Warnings that name none are noted with every one."""
    found: dict[str, dict[str, int]] = {}
    notes: list[tuple[str, str]] = []  # kernel, or "" for all; what is said
    name = ""
    for line in said.splitlines():
        _, _, text = line.partition(":")
        text = text.strip()
        if entry := re.match(r"Compiling entry function '(\S+)' for", text):
            name = entry[1]
            found[name] = {"spills": 0, "shared": 0}
        elif spills := re.search(r"(\d+) bytes spill stores", line):
            if name:  # otherwise of a function that is called; ptxas lists those after their kernel
                found[name]["spills"] += int(spills[1])
        elif registers := re.match(r"Used (\d+) registers", text):
            shared = re.search(r"(\d+) bytes smem", text)
            found[name].update(registers=int(registers[1]), shared=int(shared[1]) if shared else 0)
        elif text.startswith("(C") or "warning" in line.split(":")[0].lower():
            of = re.search(r"in (?:the )?function '(\S+)'", text)
            notes.append((of[1] if of else "", re.sub(r" in (?:the )?function '.*", "", text)))
    lacking = [name for name, values in found.items() if "registers" not in values]
    if lacking:
        raise ValueError(f"ptxas does not say what registers are used by {lacking[0]}")
    return {
        name: Assembled(**values, notes=tuple(note for of, note in notes if of in ("", name))) for name, values in found.items()
    }
