"""The emulation, compiled once."""

from __future__ import annotations

import pytest

from .emulator import Emulator, why_not


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """The CUDA operators on CPU tensors."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    return Emulator(tmp_path_factory.mktemp("cuda_emulation") / "emulation.so")
