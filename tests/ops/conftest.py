"""Every implementation that this machine can run, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import grace_kernels
from grace_kernels import backends

COMPILED = grace_kernels.build_info()["cpu"]["available"]
ISAS = backends.available_isas() if COMPILED else []


@pytest.fixture(params=["reference", *(f"cpu-{isa}" for isa in ISAS)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name to pass as `backend`; for the CPU kernels, with the instruction set switched."""
    name, _, isa = request.param.partition("-")
    if not isa:
        yield name
        return
    before = backends.isa()
    torch.ops.grace_cpu.use_isa(isa)
    yield name
    torch.ops.grace_cpu.use_isa(before)


@pytest.fixture(params=ISAS or [pytest.param("", marks=pytest.mark.skip(reason="not compiled"))])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set of the compiled kernels, switched to."""
    before = backends.isa()
    torch.ops.grace_cpu.use_isa(request.param)
    yield request.param
    torch.ops.grace_cpu.use_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Give the number of threads back as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
