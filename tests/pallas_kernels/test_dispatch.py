"""The chooser of implementations: what is named is what runs; None goes on for NotImplementedError alone, and says so once."""

from __future__ import annotations

import inspect
import logging
import sys
import types
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import dispatch
from tests.test_arrows import imports


def unsupported(*args, **kwargs):
    raise NotImplementedError("x: not this one")


def broken(*args, **kwargs):
    raise TypeError("a bug")


def works(x, *, scale=1):
    return x * scale


@pytest.fixture(autouse=True)
def untold(monkeypatch):
    monkeypatch.setattr(dispatch, "_told", set())


def test_a_named_implementation_never_falls_back():
    """Neither for what it does not support, nor for an error."""
    implementations = {"tpu": unsupported, "gpu": broken, "xla": works, "reference": works}
    with pytest.raises(NotImplementedError, match="x: not this one"):
        dispatch.run("op", implementations, "tpu", 3)
    with pytest.raises(TypeError, match="a bug"):
        dispatch.run("op", implementations, "gpu", 3)
    assert dispatch.run("op", implementations, "reference", 3, scale=2) == 6


def test_none_takes_the_first_that_supports_the_call():
    """In the order of the platform, not of the table; what a kernel does not have is passed over."""
    taken = {"reference": lambda x: "reference", "gpu": lambda x: "gpu", "xla": lambda x: "xla"}
    assert dispatch.run("op", taken, None, 3) == "xla"
    assert dispatch.run("op", {**taken, "xla": unsupported}, None, 3) == "reference"
    assert dispatch.run("op", {"reference": works}, None, 3) == 3


@pytest.mark.parametrize("backend, first", [("tpu", "tpu"), ("gpu", "gpu"), ("cuda", "gpu"), ("rocm", "gpu"), ("cpu", "xla")])
def test_the_platform_decides_which_are_tried(monkeypatch, backend, first):
    """An unknown one is treated as a CPU; no accelerator's kernel is tried on another."""
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform=backend, device_kind="of some kind")])
    tried = []

    def trying(name):
        def implementation():
            tried.append(name)
            raise NotImplementedError(name)

        return implementation

    with pytest.raises(NotImplementedError):
        dispatch.run("op", {name: trying(name) for name in ("reference", "gpu", "tpu", "xla")}, None)
    assert tried == list(dict.fromkeys([first, "xla", "reference"]))


@pytest.mark.parametrize("kind, platform", [("TPU v5 lite", "tpu"), ("NVIDIA H100 80GB HBM3", "gpu"), ("cpu", "cpu")])
def test_a_mesh_of_devices_that_are_not_here_decides_before_the_backend(kind, platform):
    """So that what is compiled for a TPU from a CPU takes the TPU's kernel."""
    fields = inspect.signature(AbstractDevice).parameters  # newer versions of jax have the platform, too
    given = {"device_kind": kind, "num_cores": 1, "platform": platform}
    device = AbstractDevice(**{name: given[name] for name in fields})
    with jax.sharding.use_abstract_mesh(AbstractMesh((2,), ("data",), abstract_device=device)):
        assert dispatch.platform() == platform
        assert dispatch.device_kind() == kind
    assert dispatch.platform() == "cpu"
    assert dispatch.device_kind() == jax.devices()[0].device_kind


def test_only_not_implemented_goes_to_the_next():
    """Any other error is the caller's to see, though the next would have worked."""
    for error in (TypeError, ValueError, RuntimeError, KeyError):

        def fails(x, error=error):
            raise error("a bug")

        with pytest.raises(error, match="a bug"):
            dispatch.run("op", {"xla": fails, "reference": works}, None, 3)


def test_where_none_supports_the_call_every_reason_is_told():
    def also(*args):
        raise NotImplementedError("y: nor this")

    with pytest.raises(
        NotImplementedError, match="no implementation of op supports this call on cpu: xla: x: not.*reference: y: nor"
    ):
        dispatch.run("op", {"xla": unsupported, "reference": also}, None, 3)


def test_what_was_taken_is_logged_once_with_why_others_were_not(caplog):
    caplog.set_level(logging.INFO, "pallas_kernels.dispatch")
    for _ in range(3):
        dispatch.run("op", {"xla": unsupported, "reference": works}, None, 3)
        dispatch.run("op", {"xla": works}, None, 3)
        dispatch.run("another", {"xla": works}, None, 3)
        dispatch.run("op", {"xla": works}, "xla", 3)  # no choice, so nothing to tell
    assert [record.message for record in caplog.records] == [
        "op on cpu: implementation 'reference' (xla: x: not this one)",
        "op on cpu: implementation 'xla'",
        "another on cpu: implementation 'xla'",
    ]


@pytest.mark.parametrize("given, says", [
    ("xlaa", r"^implementation='xlaa'; allowed: None, 'xla', 'reference'; nearest: 'xla'$"),
    ("zzz", r"^implementation='zzz'; allowed: None, 'xla', 'reference'$"),
    (3, r"^implementation=3; allowed: None, 'xla', 'reference'$"),
    ("", r"^implementation=''; allowed"),
])  # fmt: skip
def test_a_name_that_there_is_not_is_told_the_nearest(given, says):
    with pytest.raises(ValueError, match=says):
        dispatch.run("op", {"xla": works, "reference": works}, given, 3)


# The compile matrix alone, inside of the process that has the compiler's environment (.venv-tpu).
EXCEPTED = {("aot/tpu.py", "libtpu")}


def test_the_kernels_import_jax_numpy_and_the_standard_library_alone():
    """So that they can be taken as they are; tests/test_arrows.py holds that they import nothing else of this project."""
    root = Path(dispatch.__file__).parent
    known = {*sys.stdlib_module_names, "jax", "numpy", "pallas_kernels"}
    found = {
        (path.relative_to(root).as_posix(), target.split(".")[0])
        for path in root.rglob("*.py")
        for _, target in imports(path.read_text(), "pallas_kernels." + path.stem)
        if target.split(".")[0] not in known
    }
    assert found == EXCEPTED
