"""A device that is not here, and how a case is compiled for it."""

from __future__ import annotations

import time
from typing import Any

from pallas_kernels.cases import Build


class Device:
    """The first device of a topology of `jax.experimental.topologies`."""

    def __init__(self, topology: Any):
        import numpy as np
        from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

        mesh = Mesh(np.array(topology.devices[:1]), ("device",))
        self.sharding = NamedSharding(mesh, PartitionSpec())
        # Kernels ask the mesh in use what they are compiled for, the default device where it does not say.
        self.mesh = AbstractMesh((), (), abstract_device=mesh.abstract_mesh.abstract_device)

    def compile(self, build: Build) -> tuple[float, str]:
        """Seconds of lowering and compilation, and the compiled module's text."""
        import jax

        with jax.sharding.use_abstract_mesh(self.mesh):
            function, specs = build()
            specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.sharding), specs)
            began = time.perf_counter()
            compiled = jax.jit(function).lower(*specs).compile()
        return time.perf_counter() - began, compiled.as_text()
