"""What runs inside vLLM itself needs its environment (`make test-vllm`); the rest runs anywhere."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "edit"))  # the small models

_INSIDE = ["test_engine_vllm.py", "test_processes_vllm.py"]
collect_ignore = [] if importlib.util.find_spec("vllm") else _INSIDE


@pytest.fixture(scope="session")
def trained(once: Callable[..., Path]) -> Callable[[str], Any]:
    """Return a function that gives a fresh copy of a trained model by name."""
    from tiny_models import trained_once

    return trained_once(once)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the directory of SmolLM2 as transformers saves it."""
    if "SMOLLM2" in os.environ:
        return os.environ["SMOLLM2"]
    from grace_edit.demo.smollm2 import load_smollm2

    where = tmp_path_factory.mktemp("smollm2")
    model, tokenizer = load_smollm2()
    model.save_pretrained(where)
    tokenizer.save_pretrained(where)
    return str(where)


@pytest.fixture(scope="session")
def text(place: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from engine_models import EDITS, Reference

    return Reference(place, tmp_path_factory.mktemp("text"), "text", EDITS)
