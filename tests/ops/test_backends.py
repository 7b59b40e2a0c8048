"""Which implementation answers where, and warming one up."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import grace_kernels
from grace_kernels import ops

from . import interpreter
from .test_adapt import problem
from .test_compile import in_a_fresh_process

PACKAGE = Path(grace_kernels.__file__).parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

# A torch built with CUDA, in which a compiled library loads if there is a file.
PRETENDED = """
    import importlib.util, json, torch
    torch.version.cuda = "13.0"
    load = torch.ops.load_library
    torch.ops.load_library = lambda path: None if path.endswith("_C_cuda.so") else load(path)
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *a: None if name == hidden else find(name, *a)
    import grace_kernels
    info = grace_kernels.build_info()
    print(info["chosen"]["cuda"])
    print(info["why"]["cuda"])
    print(info["cuda"].get("remedy"))
"""


@pytest.mark.parametrize(
    ("hidden", "library", "chosen", "why"),
    [
        ("", True, "cuda", "faster at most shapes where measured, on compute capability 9.0"),
        (
            "",
            False,
            "triton",
            "triton is installed; the compiled library _C_cuda.so was not built",
        ),
        ("triton", True, "cuda", "triton is not installed; the compiled library is there"),
        (
            "triton",
            False,
            "reference",
            "triton is not installed; the compiled library _C_cuda.so was not built",
        ),
    ],
)
@needs_triton
def test_on_a_gpu_answers_what_is_there_and_of_two_the_one_measured_to_be_faster(
    tmp_path: Path, hidden: str, library: bool, chosen: str, why: str
) -> None:
    package = tmp_path / "grace_kernels"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if library:
        (package / "_C_cuda.so").touch()
    printed = in_a_fresh_process(
        f"    hidden = {hidden!r}\n" + PRETENDED, PYTHONPATH=str(tmp_path), PYTHONSAFEPATH="1"
    ).splitlines()
    assert printed[:2] == [chosen, why]
    assert printed[2].startswith("None" if library else "install the CUDA toolkit (nvcc) and")


BY_TABLE = """
    import torch
    from grace_kernels import backends, ops
    asked = []
    backends._triton = lambda: Asked("triton")
    backends._capability = lambda device: (9, 0)

    class Asked:
        def __init__(self, name):
            self.name = name

        def __getattr__(self, operator):
            def answer(*arguments):
                asked.append(self.name)
                keys = arguments[5 if operator.endswith("adapt_") else 1]
                batch = len(arguments[2 if operator.endswith("adapt_") else 0])
                return keys.new_zeros(batch, dtype=torch.int64), keys.new_zeros(batch).float()
            return answer

    for name in ("lookup", "adapt_"):
        ops.libraries["cuda"].impl(name, getattr(Asked("cuda"), name), "CPU")

    def ask(batch, keys, dim, dtype=torch.bfloat16):
        rows = torch.zeros(batch, dtype=torch.int64)
        query, book = torch.zeros(1, dtype=dtype).expand(batch, dim), torch.zeros(1, dtype=dtype)
        book, radii = book.expand(keys, dim), torch.zeros(1).expand(keys)
        ops.lookup._op_dk(torch.DispatchKey.CUDA, query, book, radii, None)
        hidden = torch.zeros(batch, 4)
        ops.adapt_._op_dk(
            torch.DispatchKey.CUDA, hidden, query, rows, rows, rows, book, radii,
            torch.zeros(1).expand(keys, 4), None,
        )
        print(*dict.fromkeys(asked), backends._by_table("lookup", book, batch))
        asked.clear()

    ask(8, 100_000, 4096)
    ask(8, 10_000, 4096)
    ask(8, 10_000, 4096, torch.float32)
    ask(512, 10_000, 4096)
    ask(512, 10_000, 768)
    backends._capability = lambda device: (8, 0)
    ask(8, 100_000, 4096)
"""


@needs_triton
def test_a_call_on_a_gpu_is_answered_by_what_the_table_says(tmp_path: Path) -> None:
    package = tmp_path / "grace_kernels"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (package / "_C_cuda.so").touch()
    printed = in_a_fresh_process(
        "    hidden = ''\n" + PRETENDED + BY_TABLE, PYTHONPATH=str(tmp_path), PYTHONSAFEPATH="1"
    ).splitlines()
    expected = ["cuda", "triton", "cuda", "triton", "cuda", "triton"]
    assert printed[3:] == [f"{chosen} {chosen}" for chosen in expected]


@needs_triton
def test_a_call_on_a_gpu_is_answered_by_what_was_chosen() -> None:
    p = problem()
    p["count"] = torch.tensor(9)
    expected = grace_kernels.lookup(p["source"], p["keys"], p["radii"], p["count"])
    launched = []
    with interpreter.interpreting() as launcher, pytest.MonkeyPatch.context() as patch:
        kernel = launcher.lookup_kernels[2]

        class Watched:
            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                launched.append(grid)
                return kernel[grid]

        patch.setattr(launcher, "lookup_kernels", [Watched()] * 3)
        # What the dispatcher calls for tensors on a GPU, called with tensors on a CPU.
        on_a_gpu = ops.lookup._op_dk
        index, distance = on_a_gpu(
            torch.DispatchKey.CUDA, p["source"], p["keys"], p["radii"], p["count"]
        )
    assert grace_kernels.build_info()["chosen"]["cuda"] == "triton"
    assert launched == [(1, 1)]
    assert torch.equal(index, expected[0])
    assert torch.equal(distance, expected[1])


def test_operators_know_shapes_and_device_of_their_answers_on_a_gpu() -> None:
    with FakeTensorMode():
        p = {
            name: torch.empty(t.shape, dtype=t.dtype, device="cuda")
            for name, t in problem().items()
        }
        count = torch.empty((), dtype=torch.int64, device="cuda")
        for backend in (None, "reference"):
            hidden, index, distance = grace_kernels.adapt(**p, count=count, backend=backend)
            assert hidden.device.type == index.device.type == distance.device.type == "cuda"
            assert hidden.shape == (20, 7)
            assert (index.dtype, distance.dtype) == (torch.int64, torch.float32)
            assert index.shape == distance.shape == (5,)


def test_a_codebook_on_another_device_is_refused_and_nothing_is_written() -> None:
    p = problem()
    before = p["hidden"].clone()
    for name in ("keys", "radii", "values"):
        elsewhere = {**p, name: p[name].to("meta")}
        with pytest.raises(ValueError, match=rf"{name} must be on the device of source \(cpu\)"):
            grace_kernels.adapt_(**elsewhere)
    assert torch.equal(p["hidden"], before)


class Calls(TorchDispatchMode):
    """Notes the grace operators that are called, and on how many queries."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("grace"):
            source = args[1] if func.__name__.startswith("adapt_") else args[0]
            self.seen.append((func.__name__.split(".")[0], len(source), args[-1] is not None))
        return func(*args, **(kwargs or {}))


def test_warming_up_calls_every_operator_for_every_batch_size() -> None:
    with Calls() as calls:
        assert grace_kernels.warmup(24, 7, torch.bfloat16, "cpu", (1, 5)) is None
    names = {name for name, _, _ in calls.seen}
    assert names == {"nearest", "lookup", "adapt_"}
    assert {size for _, size, _ in calls.seen} == {1, 5}
    assert len(calls.seen) == 12


@pytest.mark.parametrize("dim", [32, 7])
def test_warming_up_as_on_a_gpu_meets_many_entries_in_little_memory(
    monkeypatch: pytest.MonkeyPatch, dim: int
) -> None:
    monkeypatch.setattr("grace_kernels.api.WARM_ENTRIES", (5000,))
    asked: list[torch.Tensor] = []

    def seen(query: torch.Tensor, keys: torch.Tensor, *rest: Any, **how: Any) -> None:
        asked.append(keys)

    monkeypatch.setattr("grace_kernels.api.lookup", seen)
    grace_kernels.warmup(dim, 16, torch.bfloat16, "cpu", (3,))  # the other two do answer
    for keys in asked:
        assert keys.shape == (5000, dim)
        assert keys.untyped_storage().nbytes() < 200_000
        assert (keys.stride(0) % 16 == 0) == (dim % 16 == 0)
    assert len(asked) == 2


def test_warming_up_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="dim must not be negative, got -1"):
        grace_kernels.warmup(-1, 7, torch.float32, "cpu")
    with pytest.raises(ValueError, match="batch_sizes must not be negative, got -3"):
        grace_kernels.warmup(4, 7, torch.float32, "cpu", [-3])
    with pytest.raises(ValueError, match=r"float32, float16 or bfloat16, got torch\.float64"):
        grace_kernels.warmup(4, 7, torch.float64, "cpu")
