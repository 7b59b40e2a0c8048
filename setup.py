"""Build the compiled operators (see pyproject.toml for everything else).

The library uses torch's stable ABI and no Python C API, so one wheel serves every Python >= 3.10
and torch >= 2.10. Compiling needs a C++ compiler and a torch: the one of the environment that is
installed into, even where pip builds in an isolated one. Without either a pure wheel is built,
which answers from the reference.

GRACE_KERNELS_COMPILE says what is compiled: `0` nothing, `cpu` the CPU kernels, `cuda` the CUDA
kernels too, or an error. Unset or `1`: the CPU kernels, and the CUDA kernels where torch was built
for CUDA and nvcc is there and compiles them. Those are compiled for sm_80, sm_90 and what comes
after, or for what TORCH_CUDA_ARCH_LIST says. What is compiled for 9.0 has the instructions that
this capability alone has (sm_90a).

GRACE_KERNELS_NAMESPACE is the namespace in which the operators are registered, `grace` unless set;
`hub/export.py` sets it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

TORCH_MIN = (2, 10)
ROOT = Path(__file__).parent


WANTED = os.environ.get("GRACE_KERNELS_COMPILE", "")
if WANTED not in ("", "0", "1", "cpu", "cuda"):
    raise SystemExit(f"GRACE_KERNELS_COMPILE must be 0, 1, cpu or cuda, got {WANTED}")
TARGETS = ["compute_80,code=sm_80", "compute_90a,code=sm_90a", "compute_90,code=compute_90"]


def find_torch() -> None:
    """Make the torch of the environment that is installed into importable, if it is not yet.

    pip builds in an environment of its own, where only what pyproject.toml requires is found. To
    require torch there would download gigabytes and throw them away after the build.
    """
    if importlib.util.find_spec("torch") is not None:
        return
    # pip hides the environment by these two; without them the same Python finds its packages.
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE")
    outside = {name: value for name, value in os.environ.items() if name not in hidden}
    ask = (
        "import importlib.util, json, sys\n"
        "print(json.dumps([sys.path, importlib.util.find_spec('torch') is not None]))"
    )
    asked = subprocess.run(
        [sys.executable, "-c", ask], env=outside, capture_output=True, text=True, check=True
    )
    folders, there = json.loads(asked.stdout.splitlines()[-1])
    if there:
        # Behind the build's own folders: its setuptools stays the one in use.
        sys.path += [folder for folder in folders if folder and folder not in sys.path]


def missing() -> str | None:
    """Return why nothing can be compiled, or None."""
    if WANTED == "0":
        return "GRACE_KERNELS_COMPILE is 0"
    # Every word that is no option, as in "ccache g++": the wrapper alone compiles nothing.
    words = [word for word in shlex.split(os.environ.get("CXX", "c++")) if not word.startswith("-")]
    for word in words or ["CXX is empty"]:
        if shutil.which(word) is None:
            return f"there is no C++ compiler ({word})"
    find_torch()
    try:
        import torch
    except ImportError as error:
        there = importlib.util.find_spec("torch") is not None
        return f"torch cannot be imported ({error})" if there else "torch is not installed"
    if torch.__version__ < TORCH_MIN:
        return f"torch {torch.__version__} is older than {'.'.join(map(str, TORCH_MIN))}"
    return None


def toolkit() -> tuple[Path, Path] | str:
    """Return the folders of the CUDA toolkit and of its static run time, or why there are none."""
    if WANTED == "cpu":
        return "GRACE_KERNELS_COMPILE is cpu"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        return f"there is no nvcc in {home}/bin" if home else "there is no nvcc"
    # nvcc may be a wrapper in another folder, so it is asked where it really is.
    asked = [nvcc, "--dryrun", "-x", "cu", os.devnull]
    told = subprocess.run(asked, capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", told, re.MULTILINE)
    if top is None:
        return f"{nvcc} does not say where it is"
    home = Path(top[1]).resolve()
    for folder in (home / "lib64", home / "lib", *home.glob("targets/*/lib")):
        if (folder / "libcudart_static.a").exists():
            break
    else:
        return f"there is no libcudart_static.a in {home}"
    import torch

    if WANTED != "cuda" and torch.version.cuda is None:
        return "torch was built without CUDA (GRACE_KERNELS_COMPILE=cuda builds them all the same)"
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)", said)
    wanted = (torch.version.cuda or "").split(".")[0]
    if wanted and release is not None and release[1] != wanted:
        return f"nvcc is of CUDA {release[1]}, torch of CUDA {torch.version.cuda}"
    return home, folder


def targets() -> list[str]:
    """Return what the CUDA kernels are compiled for; nothing where torch is to read its list."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    found = []
    for entry in re.split(r"[\s;]+", listed.strip()) if listed else ():
        of = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if of is None:  # torch knows chips by name, too
            return []
        number = of[1] + of[2]
        exact = number + (of[3] or ("a" if number == "90" else ""))
        found.append(f"compute_{exact},code=sm_{exact}")
        if of[4]:
            found.append(f"compute_{number},code=compute_{number}")
    return list(dict.fromkeys(found)) or TARGETS


def compiled() -> dict[str, Any]:
    """Return the arguments of setup() that build grace_kernels/_C.so and perhaps _C_cuda.so."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    # The version is a byte per part: 2.10 is 0x020a, not 0x0210.
    target = (TORCH_MIN[0] << 56) | (TORCH_MIN[1] << 48)
    macros = [("TORCH_TARGET_VERSION", f"0x{target:016x}ULL")]
    namespace = os.environ.get("GRACE_KERNELS_NAMESPACE")
    if namespace:
        macros.append(("GRACE_NAMESPACE", namespace))
    depends = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*.[chi]*"))]
    cpu = CppExtension(
        "grace_kernels._C",
        [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/cpu/*.cpp"))],
        depends=depends,
        define_macros=macros,
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
    extensions = [cpu]
    found = toolkit()
    if isinstance(found, tuple):
        extensions.append(cuda(*found, macros, depends))
    elif WANTED == "cuda":
        raise SystemExit(f"grace-kernels: GRACE_KERNELS_COMPILE is cuda, but {found}")
    else:
        print(f"grace-kernels: building without CUDA kernels, because {found}", file=sys.stderr)

    class Build(BuildExtension.with_options(no_python_abi_suffix=True)):  # type: ignore[misc]
        """The CUDA kernels are left out, and that is said, where nvcc cannot compile them."""

        def build_extension(self, extension: Any) -> None:
            try:
                super().build_extension(extension)
            except Exception as error:
                if not extension.optional:
                    print(
                        f"grace-kernels: {extension.name} could not be compiled; "
                        "GRACE_KERNELS_COMPILE=0 installs without compiled operators",
                        file=sys.stderr,
                    )
                    raise
                why = f"nvcc failed: {str(error).splitlines()[0]}"
                print(f"grace-kernels: building without CUDA kernels, {why}", file=sys.stderr)

    return {"ext_modules": extensions, "cmdclass": {"build_ext": Build, "bdist_wheel": Wheel}}


def cuda(home: Path, run_time: Path, macros: list[tuple[str, str]], depends: list[str]) -> Any:
    """Return the extension grace_kernels/_C_cuda.so; works with a torch for CPUs too."""
    from torch.utils import cpp_extension

    # CUDAExtension and torch's own search for the toolkit need a torch that was built for CUDA.
    cpp_extension.CUDA_HOME = str(home)
    options = ["-O3", "--threads=2", "-Xptxas", "-v", "-Xcompiler", "-fvisibility=hidden,-Wall"]
    wanted = targets()
    options += [f"-gencode=arch={target}" for target in wanted]
    if any(target.endswith("sm_90a") for target in wanted):
        macros = [*macros, ("GRACE_WARPGROUPS", "1")]
    extension = cpp_extension.CppExtension(
        "grace_kernels._C_cuda",
        [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/cuda/*.cu"))],
        depends=depends,
        include_dirs=[str(ROOT / "csrc" / "cuda")],
        define_macros=[*macros, ("USE_CUDA", "1")],
        extra_compile_args={"cxx": [], "nvcc": options},
        library_dirs=[str(run_time)],
        # The static run time, since torch's may be of another version.
        libraries=["cudart_static", "dl", "rt", "pthread"],
        # libtorch.so brings libtorch_cuda.so, which a torch for CPUs does not have to link with.
        extra_link_args=["-Wl,--no-as-needed", "-ltorch"],
        py_limited_api=True,
    )
    extension.optional = WANTED != "cuda"
    return extension


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
        *find_packages("python", include=["grace_edit", "grace_edit.*", "grace_vllm"]),
    ],
    package_dir={
        "grace_kernels": "grace_kernels",
        "grace_edit": "python/grace_edit",
        "grace_vllm": "python/grace_vllm",
    },
    include_package_data=False,  # not whatever MANIFEST.in puts into the source distribution
    package_data={
        "grace_kernels": ["py.typed"],
        "grace_edit": [
            "py.typed",
            "demo/data/*.tsv",
            "keys/maps/*/*",
            "keys/maps/README.md",
            "keys/wordings.txt",
            "server/*.html",
        ],
    },
    **(compiled() if why_not is None else {}),
)
