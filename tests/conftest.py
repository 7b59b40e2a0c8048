"""What every test gets: no downloads, few threads, the package found without an installation.

With `--gpu`, on a machine that has one, what runs on a GPU and nothing else: what asks for a
`backend`, a `place` or `places` (tests/ops), and what is marked `gpu`. Run it with pytest-xdist and
pytest-timeout, so that a hang or a crash takes one test with it: `make gpu-check` does.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Iterator

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
    parser.addoption("--gpu", action="store_true", help="run what runs on a GPU, and nothing else")
    parser.addoption(
        "--only",
        choices=("triton", "cuda", "warpgroups"),
        help="with --gpu, of the implementations this one; cuda: but for its form warpgroups",
    )
    parser.addoption(
        "--until", type=float, help="seconds since 1970 from which on what is left is not run"
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


def pytest_configure(config: pytest.Config) -> None:
    """Without a GPU, have triton interpreted: it asks for that when it is imported itself."""
    if config.getoption("--gpu"):
        return
    with contextlib.suppress(ImportError), pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("triton")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest files first; with `--gpu`, what a GPU takes part in alone, `bulk` last."""
    place = {name: n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get("/".join(item.path.parts[-2:]), len(LONGEST)))
    if config.getoption("--gpu"):
        items[:] = [item for item in items if _on_a_gpu(item)]
        items.sort(key=lambda item: item.get_closest_marker("bulk") is not None)


def _on_a_gpu(item: pytest.Item) -> bool:
    names = getattr(item, "fixturenames", ())
    asks = {"backend", "place", "places"} & set(names)
    return bool(asks) or item.get_closest_marker("gpu") is not None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Begin nothing once the time is over."""
    until = item.config.getoption("--until")
    if until is not None and time.time() > until:
        pytest.skip("not run: the time was over")


@pytest.fixture(autouse=True)
def device_in_order(request: pytest.FixtureRequest) -> Iterator[None]:
    """With `--gpu`, fail the test that leaves a GPU of no more use."""
    yield
    if not request.config.getoption("--gpu"):
        return
    why = ""
    try:
        torch.cuda.synchronize()
        if torch.cuda.current_stream() != torch.cuda.default_stream():
            why = "a capture that failed is still going on"
    except RuntimeError as error:
        why = str(error).splitlines()[0]
    if why:
        request.config.stash[LOST] = why
        pytest.fail(f"the GPU is lost: {why}")


LOST = pytest.StashKey[str]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """End a process whose GPU is lost: no test behind would pass. pytest-xdist starts another."""
    done = yield
    if LOST in item.config.stash:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(75)
        pytest.exit("the GPU is lost", 75)
    return done
