"""Which implementation answers: the compiled library, the choice by name, and `build_info`.

`backend=None` leaves the choice to the dispatcher: on a CPU the compiled kernels if `_C.so` is
there, otherwise the reference, which is also what every other device gets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from . import ops

Backend = Literal["reference", "cpu", "triton", "cuda"]
NAMES: tuple[str, ...] = ("reference", "cpu", "triton", "cuda")

_REMEDY = (
    "install a C++ compiler (g++ or clang++) and reinstall: "
    "pip install --force-reinstall --no-deps grace-kernels, "
    "or pip install --no-build-isolation -e . in a checkout"
)


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


_CPU_LIBRARY = Path(__file__).with_name("_C.so")
_cpu_missing = _load(_CPU_LIBRARY)  # at import, before anything is traced

_REFERENCE: dict[str, Any] = {
    "nearest": ops.reference_nearest,
    "lookup": ops.reference_lookup,
    "adapt_": ops.reference_adapt_,
}
_GRACE: dict[str, Any] = {"nearest": ops.nearest, "lookup": ops.lookup, "adapt_": ops.adapt_}


def select(name: str, backend: str | None, device: torch.device) -> Any:
    """Return the operator `name` of the backend asked for.

    Raises:
        ValueError: there is no backend of that name.
        BackendUnavailable: it was not built, or does not run on `device`.
    """
    if backend is None:
        return _GRACE[name]
    if backend == "reference":
        return _REFERENCE[name]
    if backend not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)} or None, got {backend!r}")
    if backend != "cpu":
        raise BackendUnavailable(
            f"backend {backend!r} is not part of this version; leave backend unset"
        )
    if device.type != "cpu":
        raise BackendUnavailable(f"backend 'cpu' needs tensors on a CPU, got {device}")
    if _cpu_missing is not None:
        raise BackendUnavailable(f"backend 'cpu': {_cpu_missing}; {_REMEDY}")
    return _GRACE[name]


def isa() -> str:
    """Return the instruction set of the compiled CPU kernels in use."""
    return str(torch.ops.grace_cpu.isa())


def available_isas() -> list[str]:
    """Return the instruction sets of the compiled CPU kernels that this machine can run."""
    return str(torch.ops.grace_cpu.isas()).split(",")


def build_info() -> dict[str, Any]:
    """Say what was built, which implementation answers on which device, and why.

    Returns:
        A dict of plain strings and lists: `torch`; `chosen` (device type to backend); `cpu` with
        `available`, and if so `isa` (the instruction set in use) and `isas` (those this machine
        can run), otherwise `reason` and `remedy`.

    Raises:
        ValueError: `GRACE_KERNELS_ISA` names an instruction set that is unknown or not available.
    """
    cpu: dict[str, Any] = {"available": _cpu_missing is None}
    if _cpu_missing is None:
        cpu["isa"] = isa()
        cpu["isas"] = available_isas()
    else:
        cpu["reason"] = _cpu_missing
        cpu["remedy"] = _REMEDY
    return {
        "torch": torch.__version__,
        "chosen": {"cpu": "cpu" if _cpu_missing is None else "reference", "cuda": "reference"},
        "cpu": cpu,
    }
