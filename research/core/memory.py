"""Memory of the host process."""

from __future__ import annotations

import ctypes
import sys

# glibc's mallopt, <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Has glibc keep freed memory for the next step; to be called before JAX runs anything. False where there is no glibc.

    XLA on CPU allocates all temporaries of a dispatch as one buffer. Above 32 MB glibc maps it from the kernel and unmaps it
    each time, and a step then spends much of its time in page faults. Kept, the process stays at its peak
    size until it ends. One arena, since those of the threads in which dispatches run cannot grow so far. No result changes.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(M_ARENA_MAX, 1), mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, 2**31 - 1)])
