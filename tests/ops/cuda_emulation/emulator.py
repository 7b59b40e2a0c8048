"""Compiles csrc/cuda for this CPU and calls it: launcher, kernels, tickets, one thread at a time.

What it shows: indices, barriers, margins, the arithmetic to the bit, the order of blocks. What it
cannot show: anything about memory that several threads use at the same time, and speed.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from grace_kernels import ops

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
NAMESPACE, FORMS = "grace_cuda_emulated", "grace_cuda_forms_emulated"
COMPILER = shlex.split(os.environ.get("CXX", "c++")) or ["c++"]


class Controls(ctypes.Structure):
    """`emulation::Controls` of block.h."""

    _fields_ = (
        ("processors", ctypes.c_int),
        ("seed", ctypes.c_uint),
        ("margin_scale", ctypes.c_float),
        ("mma_error", ctypes.c_double),
        ("capturing", ctypes.c_bool),
        ("fail_launch", ctypes.c_int),
        ("fail_malloc", ctypes.c_int),
        ("good_launches", ctypes.c_int),
        ("shared_limit", ctypes.c_int),
        ("capability", ctypes.c_int),
        ("launches", ctypes.c_int),
        ("mallocs", ctypes.c_int),
        ("scored", ctypes.c_int64),
        ("grid_x", ctypes.c_uint),
        ("grid_y", ctypes.c_uint),
        ("shared_bytes", ctypes.c_int),
        ("tickets", ctypes.c_void_p),
        ("tickets_left", ctypes.c_int),
        ("kernel", ctypes.c_void_p),
        ("dependent", ctypes.c_int),
    )


def why_not() -> str | None:
    """Say why the emulation cannot be built here, or None."""
    if not (ROOT / "csrc" / "cuda").exists():
        return "no source tree"
    if shutil.which(COMPILER[0]) is None:
        return f"there is no C++ compiler ({COMPILER[0]})"
    if not Path("/proc/self").exists():
        return "the fibers are written for Linux"
    return None


def compile_to(library: Path) -> None:
    """Compile the emulation."""
    torch_root = Path(torch.__file__).parent
    command = [
        *COMPILER,
        *["-x", "c++", "-std=c++17", "-O1", "-g0", "-shared", "-fPIC", "-fvisibility=hidden"],
        *["-ffp-contract=off", "-U_FORTIFY_SOURCE", "-w", "-DUSE_CUDA"],
        "-DTORCH_TARGET_VERSION=0x020a000000000000ULL",
        f"-I{HERE}",
        f"-I{ROOT / 'csrc' / 'cuda'}",
        f"-isystem{torch_root / 'include'}",
        str(HERE / "library.cpp"),
        *f"-o {library} -L{torch_root / 'lib'} -ltorch -ltorch_cpu".split(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr


class Emulator:
    """The operators of `grace_cuda`, on CPU tensors, and the knobs of the device they run on."""

    def __init__(self, library: Path) -> None:
        self._library = torch.library.Library(NAMESPACE, "DEF")
        for name in ops.LOOKUPS:
            self._library.define(name + ops._SCHEMAS[name])
        self._forms = torch.library.Library(FORMS, "DEF")
        self._forms.define("use(str names) -> ()")
        self._forms.define("in_use() -> str")
        torch.ops.load_library(str(library))
        loaded = ctypes.CDLL(str(library))
        loaded.emulation_controls.restype = ctypes.POINTER(Controls)
        self._default_forms = ""
        self._reset = loaded.emulation_reset
        self._take = loaded.emulation_take
        self._take.restype, self._take.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int)
        self.tensor_error = ctypes.c_double.in_dll(loaded, "emulation_tensor_error").value
        self.controls: Controls = loaded.emulation_controls().contents
        self.defaults = {name: getattr(self.controls, name) for name, _ in Controls._fields_}

    def use(self, forms: str) -> None:
        """Let these forms of csrc/cuda/forms.h be in use."""
        getattr(torch.ops, FORMS).use(forms)

    def forms(self) -> str:
        """Return the forms in use."""
        return str(getattr(torch.ops, FORMS).in_use())

    @contextmanager
    def default_forms(self, forms: str) -> Iterator[None]:
        """Inside the block, the forms of devices for which none are named."""
        self._default_forms = forms
        try:
            yield
        finally:
            self._default_forms = ""

    @contextmanager
    def device(self, forms: str | None = None, **settings: Any) -> Iterator[Controls]:
        """A fresh device with these settings and forms of csrc/cuda/forms.h, inside the block."""
        self.use(self._default_forms if forms is None else forms)
        for name, value in {**self.defaults, **settings}.items():
            setattr(self.controls, name, value)
        self._reset()
        try:
            yield self.controls
        finally:
            self.use("")

    def take(self, stream: int, words: int) -> int:
        """Return the address of tickets for a launch, all of which are 0."""
        address = self._take(stream, words)
        assert list((ctypes.c_uint * words).from_address(address)) == [0] * words
        return address

    def __call__(self, name: str, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Run an operator; its tickets must be 0 again."""
        operator = getattr(getattr(torch.ops, NAMESPACE), name)
        self.controls.seed += 1
        index, distance = operator(*arguments)
        assert self.controls.tickets_left == 0
        return index, distance
