"""What runs inside vLLM itself needs its environment (`make test-vllm`); the rest runs anywhere."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "edit"))  # the small models

collect_ignore = [] if importlib.util.find_spec("vllm") else ["test_engine_vllm.py"]


@pytest.fixture(scope="session")
def trained(once: Callable[..., Path]) -> Callable[[str], Any]:
    """Return a function that gives a fresh copy of a trained model by name."""
    from tiny_models import build, train

    def copy_of(name: str) -> Any:
        path = once(f"{name}.pt", lambda path: torch.save(train(name).state_dict(), path))
        with torch.random.fork_rng(devices=[]):
            model = build(name).eval()
        model.load_state_dict(torch.load(path))
        return copy.deepcopy(model)

    return copy_of
