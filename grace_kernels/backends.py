"""Which implementation answers: libraries, the choice by device and by name, `build_info`.

`backend=None` leaves the choice to the dispatcher. On a CPU the compiled kernels answer if `_C.so`
is there, otherwise the reference. On a GPU a chooser registered here answers: of the compiled CUDA
kernels and Triton the one that is there, where both are the faster one by the measurements in
`choice.py`, where neither is the reference.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from . import ops
from .choice import TRITON_IS_FASTER, triton_is_faster

Backend = Literal["reference", "cpu", "triton", "cuda"]
NAMES: tuple[str, ...] = ("reference", "cpu", "triton", "cuda")

_REINSTALL = "and reinstall from a checkout: pip install --force-reinstall --no-deps ."
_REMEDY = {
    "cpu": f"install a C++ compiler (g++ or clang++) if there is none, {_REINSTALL}",
    "cuda": f"install the CUDA toolkit (nvcc) {_REINSTALL}"
    if torch.version.cuda is not None
    else "install a CUDA build of torch",
    "triton": "pip install triton",
}


class BackendUnavailable(RuntimeError):
    """An implementation was asked for by name and cannot answer; says why and the remedy."""


def _load(path: Path) -> str | None:
    """Load a library of kernels; return why it could not be, or None."""
    if not path.exists():
        return f"the compiled library {path.name} was not built"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the compiled library {path.name} does not load: {error}"
    return None


# At import, before anything is traced. The second library needs symbols of a CUDA build of torch.
_FOLDER = Path(__file__).parent
_cpu_missing = _load(_FOLDER / "_C.so")
if torch.version.cuda is None:
    _cuda_missing: str | None = "this torch was built without CUDA"
else:
    _cuda_missing = _load(_FOLDER / "_C_cuda.so")


_triton_missing: str | None = None  # found out without importing triton, which takes long
if importlib.util.find_spec("triton") is None:
    _triton_missing = "triton is not installed"
elif torch.version.hip is not None:
    _triton_missing = "the kernels were never tried on AMD GPUs"

_MISSING = {"cpu": _cpu_missing, "triton": _triton_missing, "cuda": _cuda_missing}
_ON_CUDA = tuple(name for name in ("cuda", "triton") if _MISSING[name] is None) or ("reference",)


@lru_cache
def _triton() -> Any:
    """Return the launcher of the Triton kernels; imports triton, hence not at import."""
    from .triton import lookup

    return lookup


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU; a CPU, which tests dispatch to, has none."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _by_table(name: str, keys: torch.Tensor, batch: int) -> str:
    """Return which of two implementations answers a call of the operator `name` on a GPU."""
    slots, dim = keys.shape
    sketched = name.startswith("pruned_")
    shape = keys.element_size(), batch, slots, dim
    return "triton" if triton_is_faster(_capability(keys.device), *shape, sketched) else "cuda"


def _register(name: str) -> dict[str, Any]:
    """Put the Triton kernel and the chooser of one operator in their places; return all of it."""
    operators = {
        "reference": ops.operator("reference", name),
        "cpu": ops.operator("", name),
        "triton": ops.operator("triton", name),
        "cuda": ops.operator("cuda", name),
    }

    def by_triton(*arguments: Any) -> Any:
        return getattr(_triton(), name)(*arguments)

    for key in ("CUDA", "CPU"):  # on a CPU for triton's interpreter
        ops.libraries["triton"].impl(name, by_triton, key)
    # Where the batch and the keys are among the arguments.
    asks, has = (2, 5) if name.endswith("adapt_") else (0, 1)

    def by_table(*arguments: Any) -> Any:
        if _by_table(name, arguments[has], len(arguments[asks])) == "triton":
            return by_triton(*arguments)
        return operators["cuda"](*arguments)

    only = by_triton if _ON_CUDA[0] == "triton" else operators[_ON_CUDA[0]]
    ops.libraries[""].impl(name, only if len(_ON_CUDA) == 1 else by_table, "CUDA")
    return operators


_OPERATORS = {name: _register(name) for name in ops.LOOKUPS}
_CHOSEN: dict[str, Any] = {name: getattr(ops, name) for name in ops.LOOKUPS}


def select(name: str, backend: str | None, keys: torch.Tensor, batch: int) -> Any:
    """Return the operator `name` of the backend asked for, for a call with such keys and queries.

    Where none is asked for it is `grace::*`, which chooses when it is called; but where that would
    only be a second way through the dispatcher, it is chosen now. Never while a graph is traced: it
    is to hold for other shapes too.

    Raises:
        ValueError: there is no backend of that name.
        BackendUnavailable: it was not built, or does not run on the device of the keys.
    """
    if backend is None:
        if not torch.compiler.is_compiling() and keys.is_cuda and type(keys) is torch.Tensor:
            only = len(_ON_CUDA) == 1
            return _OPERATORS[name][_ON_CUDA[0] if only else _by_table(name, keys, batch)]
        return _CHOSEN[name]
    if backend not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)} or None, got {backend!r}")
    if backend != "reference":
        why_not = _MISSING[backend]
        if why_not is not None:
            raise BackendUnavailable(f"backend {backend!r}: {why_not}; {_REMEDY[backend]}")
        _check_device(backend, keys.device)
    return _OPERATORS[name][backend]


def _check_device(backend: str, device: torch.device) -> None:
    wanted = "cpu" if backend == "cpu" else "cuda"
    if device.type == wanted or (backend == "triton" and device.type == "cpu" and _interpreted()):
        return
    where = "a CPU" if backend == "cpu" else "a CUDA device"
    raise BackendUnavailable(
        f"backend {backend!r} needs tensors on {where}, got {device}; move them, or leave backend "
        "unset"
    )


def _interpreted() -> bool:
    """Tell whether triton's interpreter, for tests, runs the kernels on a CPU."""
    import triton

    return not isinstance(_triton().lookup_kernels[0], triton.JITFunction)


def isa() -> str:
    """Return the instruction set of the compiled CPU kernels in use."""
    return str(ops.operator("cpu", "isa")())


def available_isas() -> list[str]:
    """Return the instruction sets of the compiled CPU kernels that this machine can run."""
    return str(ops.operator("cpu", "isas")()).split(",")


def build_info() -> dict[str, Any]:
    """Say what was built, which implementation answers on which device, and why.

    Returns:
        A dict of plain strings, booleans and lists: `torch`; `chosen` (device type to backend);
        `why` (device type to the reason of that choice); and for each of `cpu`, `triton` and `cuda`
        a dict with `available` and, if not, `reason` and `remedy`. `cpu` has besides `isa`, the
        instruction set in use, and `isas`, those this machine can run.

    Raises:
        ValueError: `GRACE_KERNELS_ISA` names an instruction set that is unknown or not available.
    """
    info: dict[str, Any] = {"torch": torch.__version__}
    for backend in ("cpu", "triton", "cuda"):
        why_not = _MISSING[backend]
        info[backend] = {"available": why_not is None}
        if why_not is not None:
            info[backend].update(reason=why_not, remedy=_REMEDY[backend])
    if _cpu_missing is None:
        info["cpu"].update(isa=isa(), isas=available_isas())
    on_gpu, why = _on_a_gpu()
    info["chosen"] = {"cpu": "cpu" if _cpu_missing is None else "reference", "cuda": on_gpu}
    info["why"] = {
        "cpu": "compiled for this machine" if _cpu_missing is None else _cpu_missing,
        "cuda": why,
    }
    return info


def _on_a_gpu() -> tuple[str, str]:
    """Return what answers on the current GPU, but for what the table excepts, and why."""
    if _ON_CUDA == ("reference",):
        return "reference", f"{_triton_missing}; {_cuda_missing}"
    if _ON_CUDA == ("cuda",):
        return "cuda", f"{_triton_missing}; the compiled library is there"
    if _ON_CUDA == ("triton",):
        return "triton", f"triton is installed; {_cuda_missing}"
    measured = ", ".join(f"{major}.{minor}" for major, minor in TRITON_IS_FASTER)
    if not torch.cuda.is_available():
        return "cuda", f"faster at most shapes where measured, on compute capability {measured}"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) in TRITON_IS_FASTER:
        return "cuda", f"measured to be faster on compute capability {measured} at most shapes"
    return (
        "triton",
        f"on compute capability {major}.{minor} nothing was measured, only on {measured}",
    )
