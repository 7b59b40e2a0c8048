"""What is built where there is no compiler, and what a source distribution holds."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
import torch

ROOT = Path(__file__).parents[2]
FOLDERS = ["csrc", "grace_kernels", "python", "tests", "benchmarks", "docs"]
FILES = ["setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "constraints.txt", "LICENSE"]
FILES += ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", ".clang-format"]
BUILT = ["*.so", "*.egg-info", "__pycache__"]
OURS = ("GRACE_KERNELS_COMPILE", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in OURS}

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="no source tree")


def build(
    where: Path, *commands: str, python: str | Path = sys.executable, **environment: str
) -> str:
    """Run setup.py in `where`; return what it says about the operators."""
    done = subprocess.run(
        [python, "setup.py", "-q", *commands],
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


@pytest.fixture
def isolated(tmp_path: Path):
    """Imitate pip: a Python that builds with setuptools alone, for an environment that it hides.

    Returns a function of the folders that hold the environment's packages; it runs setup.py.
    """
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    (site_packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    requirements = tmp_path / "overlay"
    requirements.mkdir()
    installed = Path(setuptools.__file__).parents[1]
    for path in [*installed.glob("setuptools*"), *installed.glob("_distutils_hack")]:
        (requirements / path.name).symlink_to(path)
    hide = tmp_path / "site"
    hide.mkdir()
    listed = site_packages / "env.pth"
    (hide / "sitecustomize.py").write_text(
        "import sys\n"
        f"hidden = [{str(site_packages)!r}, *open({str(listed)!r}).read().splitlines()]\n"
        f"sys.path[:] = [p for p in sys.path if p not in hidden] + [{str(requirements)!r}]\n"
    )

    def run(*packages: Path) -> str:
        listed.write_text("".join(f"{folder}\n" for folder in packages))
        hidden = {"PYTHONPATH": str(hide), "PYTHONNOUSERSITE": "1", "CXX": "c++"}
        return build(ROOT, "--version", python=python, **hidden, GRACE_KERNELS_COMPILE="cpu")

    return run


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_an_isolated_build_compiles_with_the_torch_that_is_installed(isolated) -> None:
    told = isolated(Path(torch.__file__).parents[1])
    assert told == (
        "grace-kernels: building without CUDA kernels, because GRACE_KERNELS_COMPILE is cpu"
    )


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_without_torch_or_with_an_old_one_nothing_is_compiled(isolated, tmp_path: Path) -> None:
    without = "grace-kernels: building without compiled operators, because "
    assert isolated() == without + "torch is not installed"
    fake = tmp_path / "fake" / "torch"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("__version__ = (2, 9)\n")
    assert isolated(fake.parent) == without + "torch (2, 9) is older than 2.10"
    (fake / "__init__.py").write_text("raise ImportError('libtorch is gone')\n")
    assert isolated(fake.parent) == without + "torch cannot be imported (libtorch is gone)"


def test_a_build_downloads_setuptools_alone() -> None:
    requires = re.search(r"^requires = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M)
    assert requires is not None
    assert re.findall(r'"([\w-]+)', requires[1]) == ["setuptools"]


def test_every_package_that_the_product_imports_is_declared() -> None:
    imported = set()
    for path in [*ROOT.glob("grace_kernels/**/*.py"), *ROOT.glob("python/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add((node.module or "").partition(".")[0])
    ours = {"grace_kernels", "grace_edit"}
    # Triton comes with torch's builds for GPUs, tokenizers with transformers; vLLM is what loads
    # the plugin.
    ours |= {"triton", "tokenizers", "vllm"}
    project = (ROOT / "pyproject.toml").read_text().partition("[project]")[2]
    declared = re.findall(r'"([\w-]+)(?:[<>=]=[^"]*)?"', project.partition("[project.scripts]")[0])
    known = {name.replace("-", "_") for name in declared} | set(sys.stdlib_module_names) | ours
    assert {"torch", "transformers", "tqdm"} <= imported
    assert imported - known == set()


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


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        (None, ["compute_80,code=sm_80", "compute_90a,code=sm_90a", "compute_90,code=compute_90"]),
        ("9.0", ["compute_90a,code=sm_90a"]),
        ("9.0a 9.0", ["compute_90a,code=sm_90a"]),
        ("8.0;9.0+PTX", ["compute_80,code=sm_80", "compute_90a,code=sm_90a"]),
        ("10.0a 12.0", ["compute_100a,code=sm_100a", "compute_120,code=sm_120"]),
        ("Hopper", []),  # torch's to read
    ],
)
def test_where_capability_9_0_is_asked_for_its_own_instructions_are_there(
    listed: str | None, expected: list[str]
) -> None:
    wanted = {"TARGETS", "targets"}
    code = ast.parse((ROOT / "setup.py").read_text())
    code.body = [
        node
        for node in code.body
        if (isinstance(node, ast.FunctionDef) and node.name in wanted)
        or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in wanted)
    ]
    environment = {} if listed is None else {"TORCH_CUDA_ARCH_LIST": listed}
    names = {"os": SimpleNamespace(environ=environment), "re": re}
    exec(compile(code, "setup.py", "exec"), names)
    found = names["targets"]()
    assert [target for target in found if "code=sm_" in target or listed is None] == expected
    assert ("compute_90,code=compute_90" in found) == (listed is None or "+PTX" in listed)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_an_nvcc_that_fails_costs_the_cuda_kernels_and_nothing_else(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("csrc", "grace_kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns(*BUILT))
    # One short source for the CPU, and some that nvcc refuses; a torch as if built for CUDA.
    for path in (tree / "csrc" / "cpu").glob("*.cpp"):
        path.unlink()
    (tree / "csrc" / "cpu" / "nothing.cpp").write_text("int nothing() { return 0; }\n")
    for path in (tree / "csrc" / "cuda").glob("*.cu"):
        path.write_text("#error not today\n")
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
    tops = {name.partition("/")[0] for name in names}
    ours = {"grace_kernels", "grace_edit", "grace_vllm"}
    assert {top for top in tops if ".dist-info" not in top} == ours
    assert [name for name in names if name.endswith((".so", ".cpp", ".cu"))] == []

    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    paths = [path for path in tree.rglob("*") if path.is_file() and "egg-info" not in str(path)]
    paths = [path for path in paths if not path.is_relative_to(tree / "build")]
    assert len(paths) > 60
    assert [str(path) for path in paths if str(path.relative_to(tree)) not in held] == []
