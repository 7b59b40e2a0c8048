"""Write the operators in the layout that the hub's kernel loader (the package `kernels`) reads.

    OUT/build/torch-cpu/                                   Python alone, for CPUs
    OUT/build/torch-cuda/                                  the same files: Triton kernels, for GPUs
    OUT/build/torch-stable-abi210-cpu-x86_64-linux/        with the compiled CPU kernels

The folder of a variant is the package `grace_kernels` without what tests it and what shards it:
Python that imports torch, the standard library and itself by relative names (and triton, which
comes with torch for GPUs, where a kernel of it is called). The loader imports it under a name of
its own. Operators are registered once per process, so each variant has a namespace that follows
from its content: it may stand beside the installed package, other variants and other versions.

    python hub/export.py OUT [--compile]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "grace_kernels"
NAME = "grace-kernels"
VERSION = 1  # of the functions and their meaning: the loader's callers ask for it by number
LEFT_OUT = ("testing", "distributed")
STABLE_ABI = "torch-stable-abi210"  # what setup.py compiles for: every torch from 2.10 on


def sources() -> dict[str, bytes]:
    """Return the Python files to export, by their names within the package."""
    found = {path.relative_to(PACKAGE): path for path in sorted(PACKAGE.rglob("*.py"))}
    return {
        name.as_posix(): path.read_bytes()
        for name, path in found.items()
        if name.parts[0] not in LEFT_OUT
    }


def export(out: Path, *, compiled: bool) -> list[Path]:
    """Write all variants; return their folders. A folder that was there is replaced."""
    variants = [("torch-cpu", "cpu", False), ("torch-cuda", "cuda", False)]
    if compiled:
        machine = f"{platform.machine()}-{platform.system().lower()}"
        variants.append((f"{STABLE_ABI}-cpu-{machine}", "cpu", True))
    return [_write(out / "build" / name, backend, binary) for name, backend, binary in variants]


def _write(folder: Path, backend: str, compiled: bool) -> Path:
    files = sources()
    digest = hashlib.sha256(folder.name.encode())
    code = sorted((ROOT / "csrc").rglob("*.*")) if compiled else []
    for content in (*files.values(), *(path.read_bytes() for path in code)):
        digest.update(hashlib.sha256(content).digest())
    unique = digest.hexdigest()[:12]
    namespace = f"grace_{unique}"
    renamed = files["namespace.py"].replace(b'"grace"', f'"{namespace}"'.encode())
    assert renamed != files["namespace.py"], "namespace.py does not say what it said"
    files["namespace.py"] = renamed
    metadata = {
        "id": f"_{NAME.replace('-', '_')}_{backend}_{unique}",
        "name": NAME,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
    }
    files["metadata.json"] = (json.dumps(metadata, indent=2) + "\n").encode()
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    if compiled:
        _compile(folder, namespace)
    return folder


def _compile(folder: Path, namespace: str) -> None:
    """Compile the CPU kernels for a namespace and put the library into a folder."""
    settings = {"GRACE_KERNELS_COMPILE": "cpu", "GRACE_KERNELS_NAMESPACE": namespace}
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "setup.py", "-q", "build_ext"]
        command += ["--build-lib", f"{name}/lib", "--build-temp", f"{name}/temp"]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise SystemExit(f"the kernels could not be compiled:\n{done.stdout}{done.stderr}")
        shutil.copy(f"{name}/lib/grace_kernels/_C.so", folder / "_C.so")


def main() -> None:
    """Export as the command line says, and print the folders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--compile", action="store_true", help="with the compiled CPU kernels")
    arguments = parser.parse_args()
    for folder in export(arguments.out, compiled=arguments.compile):
        print(folder)


if __name__ == "__main__":
    main()
