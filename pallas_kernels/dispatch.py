"""The one chooser of all kernels: `implementation=None` takes the best that supports the call, a name takes that one or
fails."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax

log = logging.getLogger(__name__)
_told: set[str] = set()

# By platform, best first; what a kernel does not have is passed over.
ORDER = {"tpu": ("tpu", "xla", "reference"), "gpu": ("gpu", "xla", "reference"), "cpu": ("xla", "reference")}


def _device() -> Any:
    """What a call is compiled for: a device of the mesh in use where there is one, the default backend's otherwise."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0] if device is None else device


def device_kind() -> str:
    """Of what a call is compiled for, such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3"."""
    return _device().device_kind


def platform() -> str:
    """Of what a call is compiled for, such as "cpu", "gpu" or "tpu"."""
    kind = device_kind().lower()  # older versions of jax know no more of a device that is not here
    name = getattr(_device(), "platform", None) or ("tpu" if "tpu" in kind else "cpu" if "cpu" in kind else "gpu")
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


def check_platform(implementation: str) -> None:
    """Raises NotImplementedError where the implementation is for another platform than what a call is compiled for."""
    if platform() != implementation:
        raise NotImplementedError(f"implementation: {implementation!r} does not run on {platform()} ({device_kind()})")


def log_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        log.info("%s", message)


def named(implementations: Mapping[str, Any], implementation: str) -> None:
    """Raises ValueError, with the nearest match, for a name that is not in `implementations`."""
    if not isinstance(implementation, str) or implementation not in implementations:
        near = difflib.get_close_matches(str(implementation).lower(), implementations, n=1)
        hint = f"; nearest: {near[0]!r}" if near else ""
        allowed = ", ".join(map(repr, implementations))
        raise ValueError(f"implementation={implementation!r}; allowed: None, {allowed}{hint}")


def run(kernel: str, implementations: Mapping[str, Callable[..., Any]], implementation: str | None, *args: Any, **kwargs: Any):
    """Calls the named implementation, or with None the first that does not raise NotImplementedError, and logs which, once.

    A named one never falls back: its NotImplementedError, which names the argument, reaches the caller. All other errors do
    always. Raises ValueError for a name that there is not.
    """
    if implementation is not None:
        named(implementations, implementation)
        return implementations[implementation](*args, **kwargs)
    where, reasons = platform(), []
    for name in ORDER.get(where, ORDER["cpu"]):
        if name not in implementations:
            continue
        try:
            result = implementations[name](*args, **kwargs)
        except NotImplementedError as error:
            reasons.append(f"{name}: {error}")
            continue
        passed = f" ({'; '.join(reasons)})" if reasons else ""
        log_once(f"{kernel} on {where}: implementation {name!r}{passed}")
        return result
    raise NotImplementedError(f"no implementation of {kernel} supports this call on {where}: {'; '.join(reasons)}")
