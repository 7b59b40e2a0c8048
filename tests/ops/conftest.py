"""Every implementation that this machine can run, one after the other.

On a CPU: the reference, the compiled kernels by instruction set, and the Triton kernels as triton
interprets them. With `--gpu`: the Triton and the CUDA kernels on a GPU. A test that asks for a
`backend` has its inputs, made on a CPU, taken there with their strides and shared memory, and the
answers come back; what `torch.empty` gives there is poison. One that asks for a `place` does all
this itself, see problems.py; on a CPU it runs with few and small inputs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import grace_kernels
from grace_kernels import backends

from . import interpreter
from .problems import CPU, Place, poisoned

COMPILED = grace_kernels.build_info()["cpu"]["available"]
ISAS = backends.available_isas() if COMPILED else []
ON_CPU = ["reference", *(f"cpu-{isa}" for isa in ISAS)]
if importlib.util.find_spec("triton") is not None:
    ON_CPU.append("triton")
FORMS = ("exact-always,coordinates", "apart,rows", "warpgroups,coordinates,dependent")
"""Of the CUDA kernels, those that are off by default (csrc/cuda/forms.h): what goes together."""
ON_GPU = ["triton-gpu", "cuda-gpu", *(f"cuda-gpu-{forms}" for forms in FORMS)]
TRITON_APART = "triton-gpu-apart"
"""Asked for by what wants a `place`; the other tests would take too long to compile for it too."""
PLACES_ON = {
    True: [*ON_GPU, TRITON_APART],
    False: ["cpu" if COMPILED else "reference", *ON_CPU[1 + len(ISAS) :]],
}


def on_this(config: pytest.Config, names: list[str]) -> list[str]:
    """Leave of the implementations what the command line leaves."""
    only = config.getoption("--only")

    def of(name: str) -> str:  # a form that hangs must not keep the others from being tested
        return "warpgroups" if "warpgroups" in name else name.partition("-")[0]

    return [name for name in names if only is None or of(name) == only]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for a `backend` or a `place` on all that its markers leave."""
    gpu = metafunc.config.getoption("--gpu")
    marks = {mark.name for mark in metafunc.definition.iter_markers()}
    if "place" in metafunc.fixturenames:
        names = PLACES_ON[gpu]
        if "too_long_interpreted" in marks:
            names = [name for name in names if name != "triton"]
        if "sketch" in metafunc.function.__name__:  # with one this form is not another
            names = [name for name in names if name != TRITON_APART]
        metafunc.parametrize("place", on_this(metafunc.config, names), indirect=True)
    if "backend" not in metafunc.fixturenames:
        return
    names = list(ON_GPU if gpu else ON_CPU)
    if "index_values_are_checked" in marks:  # which costs a GPU a synchronisation
        names = [name for name in names if name.partition("-")[0] in ("reference", "cpu")]
    if "too_long_interpreted" in marks:
        names = [name for name in names if name != "triton"]
    if "on_a_cpu" in marks:
        names = [name for name in names if name not in ON_GPU]
    metafunc.parametrize("backend", on_this(metafunc.config, names), indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name to pass as `backend`."""
    name, _, where = request.param.partition("-")
    if where.partition("-")[0] == "gpu":
        on_the_gpu(monkeypatch)
        with poisoned(), place_of(request.param).in_use():
            yield name
    elif name == "cpu":
        with using_isa(where):
            yield name
    elif name == "triton":
        with interpreter.interpreting():
            yield name
    else:
        yield name


def place_of(param: str) -> Place:
    """Return an implementation and its device."""
    name, _, where = param.partition("-")
    where, _, forms = where.partition("-")
    if where == "gpu":
        return Place(torch.device("cuda", 0), name, "cpu" if COMPILED else "reference", forms)
    return Place(CPU, name, "reference")


@contextmanager
def answering(param: str) -> Iterator[Place]:
    """Let an implementation answer, on a CPU or on a GPU."""
    found = place_of(param)
    if found.backend == "triton" and not found.gpu:
        with interpreter.interpreting():
            yield found
    else:
        yield found


@pytest.fixture
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """An implementation and its device, in its form."""
    with answering(request.param) as found, found.in_use():
        if found.forms:
            variable = f"GRACE_KERNELS_{found.backend.upper()}_FORMS"
            monkeypatch.setenv(variable, found.forms)  # of what the test starts
        yield found


@pytest.fixture
def places(request: pytest.FixtureRequest) -> Iterator[list[Place]]:
    """All of them, for a test whose inputs take longer to make than to answer."""
    with ExitStack() as stack:
        names = on_this(request.config, PLACES_ON[request.config.getoption("--gpu")])
        yield [stack.enter_context(answering(name)) for name in names]


@pytest.fixture(params=ISAS or [pytest.param("", marks=pytest.mark.skip(reason="not compiled"))])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set of the compiled kernels, switched to."""
    with using_isa(request.param):
        yield request.param


@contextmanager
def using_isa(name: str) -> Iterator[None]:
    """Let the CPU kernels of one instruction set answer."""
    before = backends.isa()
    torch.ops.grace_cpu.use_isa(name)
    try:
        yield
    finally:
        torch.ops.grace_cpu.use_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Give the number of threads back as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def on_the_gpu(monkeypatch: pytest.MonkeyPatch, device: str = "cuda") -> None:
    """Let the public functions take their arguments to `device` and the answers back."""
    for name in ("nearest", "lookup", "adapt", "adapt_"):
        monkeypatch.setattr(grace_kernels, name, taken_to(device, getattr(grace_kernels, name)))


def taken_to(device: str, function: Any) -> Any:
    """Return `function` called with copies of its arguments on `device`.

    A copy has the strides of the original, and what shared memory shares it there, up to the part
    of it that the arguments span. What was written to is written back.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        if any(t.requires_grad for t in tensors) or any(t.device.type != "cpu" for t in tensors):
            moved = {id(t): t.to(device) for t in tensors}
            return back(function(*swap(args, moved), **swap_named(kwargs, moved)))
        memory: dict[int, tuple[int, int]] = {}
        for t in tensors:
            first, end = span(t)
            place = t.untyped_storage()._cdata
            low, high = memory.get(place, (first, end))
            memory[place] = min(low, first), max(high, end)
        spans, moved = {}, {}
        for t in tensors:
            place, (low, high) = t.untyped_storage()._cdata, memory[t.untyped_storage()._cdata]
            key = (place, t.dtype)
            # Rows far apart: what lies between is neither read nor copied.
            sparse = high - low > 1 << 28
            if key not in spans:
                flat = t.detach().as_strided((high - low,), (1,), low)
                spans[key] = flat, torch.empty_like(flat, device=device)
                if not sparse:
                    spans[key][1].copy_(flat)
            there = spans[key][1].as_strided(t.size(), t.stride(), t.storage_offset() - low)
            if sparse:
                there.copy_(t)
            moved[id(t)] = there
        result = function(*swap(args, moved), **swap_named(kwargs, moved))
        if function.__name__ == "adapt_":
            hidden = kwargs["hidden"] if "hidden" in kwargs else args[0]
            with torch.no_grad():
                hidden.copy_(moved[id(hidden)])
        return back(result)

    return call


def span(t: Tensor) -> tuple[int, int]:
    """Return the first element of its memory that a tensor spans, and the one after the last."""
    if t.numel() == 0:
        return t.storage_offset(), t.storage_offset()
    reach = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    return t.storage_offset(), t.storage_offset() + reach + 1


def swap(args: tuple, moved: dict[int, Tensor]) -> list:
    return [moved.get(id(a), a) for a in args]


def swap_named(kwargs: dict[str, Any], moved: dict[int, Tensor]) -> dict[str, Any]:
    return {name: moved.get(id(a), a) for name, a in kwargs.items()}


def back(result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.cpu() for t in result)
