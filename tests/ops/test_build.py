"""What is built where there is no compiler, and what a source distribution holds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FOLDERS = ["csrc", "grace_kernels", "python", "tests", "benchmarks", "docs"]
FILES = ["setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "constraints.txt", "LICENSE"]
FILES += ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", ".clang-format"]
BUILT = ["*.so", "*.egg-info", "__pycache__"]
OURS = ("GRACE_KERNELS_COMPILE", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in OURS}

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="no source tree")


def build(where: Path, *commands: str, **environment: str) -> str:
    """Run setup.py in `where`; return what it says about the operators."""
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *commands],
        cwd=where,
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, **environment},
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    return "".join(line for line in done.stderr.splitlines() if line.startswith("grace-kernels:"))


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"GRACE_KERNELS_COMPILE": "0"}, "GRACE_KERNELS_COMPILE is 0"),
        ({"CXX": "/nowhere/g++"}, "there is no C++ compiler (/nowhere/g++)"),
        ({"CXX": f"{sys.executable} /nowhere/g++ -m64"}, "there is no C++ compiler (/nowhere/g++)"),
        ({"CXX": ""}, "there is no C++ compiler (CXX is empty)"),
    ],
)
def test_it_is_said_why_nothing_is_compiled(environment: dict[str, str], why: str) -> None:
    told = build(ROOT, "--version", **environment)
    assert told == f"grace-kernels: building without compiled operators, because {why}"


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"GRACE_KERNELS_COMPILE": "cpu"}, "GRACE_KERNELS_COMPILE is cpu"),
        (
            {"GRACE_KERNELS_COMPILE": "", "CUDA_HOME": "/nowhere"},
            "there is no nvcc in /nowhere/bin",
        ),
    ],
)
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_it_is_said_why_there_are_no_cuda_kernels(environment: dict[str, str], why: str) -> None:
    told = build(ROOT, "--version", **{"CXX": "c++", **environment})
    assert told == f"grace-kernels: building without CUDA kernels, because {why}"


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for CUDA")
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_a_torch_without_cuda_gets_no_cuda_kernels_unless_they_are_asked_for() -> None:
    told = build(ROOT, "--version", GRACE_KERNELS_COMPILE="", CXX="c++")
    assert told.startswith(
        "grace-kernels: building without CUDA kernels, because torch was built without CUDA"
    )
    assert build(ROOT, "--version", GRACE_KERNELS_COMPILE="cuda", CXX="c++") == ""


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_cuda_kernels_that_are_asked_for_and_cannot_be_built_are_an_error() -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, "GRACE_KERNELS_COMPILE": "cuda", "CUDA_HOME": "/nowhere", "CXX": "c++"},
        timeout=300,
    )
    assert done.returncode != 0
    assert "GRACE_KERNELS_COMPILE is cuda, but there is no nvcc in /nowhere/bin" in done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_an_nvcc_that_fails_costs_the_cuda_kernels_and_nothing_else(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("csrc", "grace_kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns(*BUILT))
    # One short source for the CPU, and one that nvcc refuses; a torch as if built for CUDA.
    for path in (tree / "csrc" / "cpu").glob("*.cpp"):
        path.unlink()
    (tree / "csrc" / "cpu" / "nothing.cpp").write_text("int nothing() { return 0; }\n")
    (tree / "csrc" / "cuda" / "lookup.cu").write_text("#error not today\n")
    shutil.copy(ROOT / "pyproject.toml", tree)
    (tree / "README.md").touch()
    (tree / "LICENSE").touch()
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    pretended = 'import torch\n\ntorch.version.cuda = "13.0"\n'
    start = setup.index("import os\n")
    changed = setup[:start] + pretended + setup[start:]
    (tree / "setup.py").write_text(changed, encoding="utf-8")
    told = build(tree, "build_ext", "--inplace", GRACE_KERNELS_COMPILE="")
    if "nvcc is of CUDA" in told:
        pytest.skip(told)
    assert told.startswith("grace-kernels: building without CUDA kernels, nvcc failed: ")
    assert (tree / "grace_kernels" / "_C.so").exists()
    assert not (tree / "grace_kernels" / "_C_cuda.so").exists()
    with pytest.raises(AssertionError):
        build(tree, "build_ext", "--inplace", GRACE_KERNELS_COMPILE="cuda")


def test_without_a_compiler_there_is_a_pure_wheel_and_the_sdist_is_whole(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns(*BUILT))
    for name in FILES:
        shutil.copy(ROOT / name, tree / name)
    dist = tmp_path / "dist"
    commands = "sdist", "-d", str(dist), "bdist_wheel", "-d", str(dist)
    build(tree, *commands, GRACE_KERNELS_COMPILE="0")

    (wheel,) = dist.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"grace_kernels/api.py", "grace_kernels/py.typed", "grace_edit/__init__.py"} <= names
    assert {"grace_bench/suite.py", "grace_bench/gpu_check/report.py"} <= names
    assert [name for name in names if name.endswith((".so", ".cpp", ".cu"))] == []

    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    paths = [path for path in tree.rglob("*") if path.is_file() and "egg-info" not in str(path)]
    paths = [path for path in paths if not path.is_relative_to(tree / "build")]
    assert len(paths) > 60
    assert [str(path) for path in paths if str(path.relative_to(tree)) not in held] == []
