"""Build the compiled operators (see pyproject.toml for everything else).

The library uses torch's stable ABI and no Python C API, so one wheel serves every Python >= 3.10
and torch >= 2.10. Without a C++ compiler, or with GRACE_KERNELS_COMPILE=0, a pure wheel is built
that answers from the reference.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

TORCH_MIN = (2, 10)
ROOT = Path(__file__).parent


def missing() -> str | None:
    """Return why nothing can be compiled, or None."""
    if os.environ.get("GRACE_KERNELS_COMPILE", "1") == "0":
        return "GRACE_KERNELS_COMPILE is 0"
    # Every word that is no option, as in "ccache g++": the wrapper alone compiles nothing.
    words = [word for word in shlex.split(os.environ.get("CXX", "c++")) if not word.startswith("-")]
    for word in words or ["CXX is empty"]:
        if shutil.which(word) is None:
            return f"there is no C++ compiler ({word})"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not installed"
    return None


def compiled() -> dict[str, Any]:
    """Return the arguments of setup() that build grace_kernels/_C.so."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    # The version is a byte per part: 2.10 is 0x020a, not 0x0210.
    target = (TORCH_MIN[0] << 56) | (TORCH_MIN[1] << 48)
    extension = CppExtension(
        "grace_kernels._C",
        [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/cpu/*.cpp"))],
        depends=[str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*.[hi]*"))],
        define_macros=[("TORCH_TARGET_VERSION", f"0x{target:016x}ULL")],
        # Fusing a multiplication and an addition would change the canonical distance.
        extra_compile_args=[
            "-O3",
            "-g0",
            "-ffp-contract=off",
            "-fno-math-errno",
            "-fvisibility=hidden",
            "-Wall",
            "-Wno-psabi",
        ],
        py_limited_api=True,
    )
    build_ext = BuildExtension.with_options(no_python_abi_suffix=True)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": build_ext, "bdist_wheel": Wheel}}


class Wheel(bdist_wheel):
    """A wheel for every Python from 3.10 on: nothing in it knows Python's C API."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag, `py310-none-<platform>`."""
        return "py310", "none", super().get_tag()[2]


why_not = missing()
if why_not is not None:
    print(f"grace-kernels: building without compiled operators, because {why_not}", file=sys.stderr)

setup(
    packages=[
        *find_packages(".", include=["grace_kernels", "grace_kernels.*"]),
        *find_packages("python", include=["grace_edit", "grace_edit.*"]),
    ],
    package_dir={"grace_kernels": "grace_kernels", "grace_edit": "python/grace_edit"},
    package_data={
        "grace_kernels": ["py.typed"],
        "grace_edit": ["py.typed", "demo/data/*.tsv"],
    },
    **(compiled() if why_not is None else {}),
)
