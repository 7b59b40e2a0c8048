"""What every test gets: no downloads, few threads, the package found without an installation."""

from __future__ import annotations

import contextlib
import importlib
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A thread that waits for another one sleeps; busy waiting takes the core that the other one needs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# What colours the text of a program, or says how wide it is, on some machines alone.
os.environ.pop("FORCE_COLOR", None)
os.environ.pop("GITHUB_ACTIONS", None)
os.environ.pop("NO_COLOR", None)
os.environ.pop("PY_COLORS", None)
os.environ.pop("TERMINAL_WIDTH", None)

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock

# The files that take longest, by seconds of one core, first: pytest-xdist hands files out in this
# order, and a long one at the end would keep one process busy while the others have none.
LONGEST = (
    "ops/test_triton_pruned.py",  # 100
    "ops/test_triton.py",  # 85
    "ops/test_pruned.py",  # 85
    "ops/test_cuda.py",  # 75, of which nvcc takes two cores at a time
    "demo/test_demo.py",  # 75
    "cuda_emulation/test_scan.py",  # 60
    "edit/test_compiled.py",  # 50
    "ops/test_lookup.py",  # 50
    "ops/test_aot.py",  # 45
)

torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu", action="store_true", help="run the operator tests on the GPU backends only"
    )


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that has a file made by one process of pytest-xdist for all of them."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent

    def made(name: str, make: Callable[[Path], object]) -> Path:
        path = folder / name
        with FileLock(folder / f"{name}.lock"):
            if not path.exists():
                make(folder / f"{name}.part")
                (folder / f"{name}.part").rename(path)
        return path

    return made


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    place = {name: n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get("/".join(item.path.parts[-2:]), len(LONGEST)))


def pytest_configure(config: pytest.Config) -> None:
    """Without a GPU, have triton interpreted: it asks for that when it is imported itself."""
    if config.getoption("--gpu"):
        return
    with contextlib.suppress(ImportError), pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("triton")
