"""The emulation, compiled once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .emulator import Emulator, compile_to, why_not


@pytest.fixture(scope="session")
def emulator(once: Callable[..., Path]) -> Emulator:
    """The CUDA operators on CPU tensors."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    return Emulator(once("emulation.so", compile_to))
