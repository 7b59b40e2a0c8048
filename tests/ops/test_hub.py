"""The export for the hub's kernel loader: what is in it, and that it answers as this package does.

The variant with the compiled kernels takes a minute to compile: `make hub` makes and checks it.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HUB = ROOT / "hub"


def run(*arguments: str | Path) -> str:
    """Run Python in a process of its own; return what it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}",
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the variants that need no compiler."""
    folder = tmp_path_factory.mktemp("hub")
    run(HUB / "export.py", folder)
    return folder


def test_each_variant_has_a_name_and_a_namespace_of_its_own(out: Path) -> None:
    seen = {}
    for backend in ("cpu", "cuda"):
        folder = out / "build" / f"torch-{backend}"
        metadata = json.loads((folder / "metadata.json").read_text())
        assert metadata["backend"] == {"type": backend}
        assert (metadata["name"], metadata["version"]) == ("grace-kernels", 1)
        namespace = re.search(r'NAMESPACE = "(\w+)"', (folder / "namespace.py").read_text())
        assert namespace is not None
        seen[backend] = (metadata["id"], namespace[1])
    assert len({*seen["cpu"], *seen["cuda"], "grace"}) == 5
    assert all(name.isidentifier() for names in seen.values() for name in names)


def test_an_export_of_the_same_sources_is_the_same(out: Path, tmp_path: Path) -> None:
    run(HUB / "export.py", tmp_path)
    files = [path for path in sorted(out.rglob("*.*")) if "__pycache__" not in path.parts]
    assert len(files) > 20
    for path in files:
        assert (tmp_path / path.relative_to(out)).read_bytes() == path.read_bytes(), path


def test_only_torch_triton_and_the_standard_library_are_imported(out: Path) -> None:
    for path in out.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module)]
            for name in names:
                top = name.partition(".")[0]
                assert top in ("torch", "triton") or top in sys.stdlib_module_names, (path, name)


def test_it_answers_beside_the_installed_package_with_the_same_bits(out: Path) -> None:
    told = [json.loads(x) for x in run(HUB / "check.py", out, "--without-loader").splitlines()]
    assert [line["folder"] for line in told] == ["torch-cpu"]
    assert told[0]["compared"] > 200
    assert told[0]["namespace"].startswith("grace_")


@pytest.mark.skipif(
    importlib.util.find_spec("kernels") is None,
    reason="the hub's loader is not there: pip install --no-deps kernels tomlkit",
)
def test_the_hubs_loader_takes_it(out: Path) -> None:
    told = [json.loads(x) for x in run(HUB / "check.py", out).splitlines()]
    assert [(line["folder"], line["loader"]) for line in told] == [("torch-cpu", True)]
    assert told[0]["compared"] > 200
