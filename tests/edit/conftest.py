"""Fixtures: fresh copies of small trained models, and editors on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from grace_edit import GraceConfig, GraceEditor
from tiny_models import LAYERS, trained_once


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Run models this small on one thread: more only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def trained(once: Callable[..., Path]) -> Callable[[str], Any]:
    """Return a function that gives a fresh copy of a trained model by name."""
    return trained_once(once)


@pytest.fixture
def edited(trained: Callable[[str], Any]) -> Callable[..., GraceEditor]:
    """Return a function that attaches an editor to a fresh copy of a model."""

    def make(name: str, **config: Any) -> GraceEditor:
        config.setdefault("layer", LAYERS[name])
        return GraceEditor(trained(name), None, GraceConfig(**config))

    return make
