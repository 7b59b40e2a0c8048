"""Load exported variants as the hub's loader does and compare their answers with this package's.

In one process with each other and with the installed package, to the bit. Only what runs on a CPU.

    python hub/check.py OUT [--without-loader]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import torch

import grace_kernels
from grace_kernels.testing import random_codebook, regimes, same_bits


def load_by_path(folder: Path) -> ModuleType:
    """Import a variant under the name in its metadata, which is no package's that is installed."""
    name = json.loads((folder / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def compare(kernel: ModuleType) -> int:
    """Compare answers and replaced rows in every regime, with sketches too; return how many."""
    compared = 0
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for case in regimes(dtype):
            at = (case.query, case.keys, case.radii, case.count)
            values = torch.arange(3.0 * len(case.keys)).view(-1, 3)
            row = torch.arange(len(case.query))
            found = []
            for package in (kernel, grace_kernels):
                hidden = torch.full((len(row), 3), -1.0)
                rows = (hidden, case.query, row, row, row + 1)
                found.append(
                    (
                        *package.nearest(*at),
                        *package.lookup(*at),
                        *package.adapt_(*rows, case.keys, case.radii, values, case.count),
                        hidden,
                    )
                )
            assert all(map(same_bits, *found)), case.name
            compared += 1
    for seed in range(30):
        case = random_codebook(seed)
        sketch = kernel.Sketch.fit(case.keys, case.radii, case.count)
        at = (case.query, case.keys, case.radii, case.count)
        got, wanted = kernel.lookup(*at, sketch=sketch), grace_kernels.lookup(*at)
        assert all(map(same_bits, got, wanted)), case.name
        compared += 1
    return compared


def main() -> None:
    """Check the variants for CPUs, and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--without-loader", action="store_true", help="import by path alone, not by `kernels`"
    )
    arguments = parser.parse_args()
    kernels = []
    if not arguments.without_loader:
        os.environ["HF_HUB_OFFLINE"] = "1"
        from kernels import get_local_kernel

        kernels.append(get_local_kernel(arguments.out, backend="cpu"))  # the best for this machine
    taken = [Path(str(kernel.__file__)).parent for kernel in kernels]
    folders = sorted(arguments.out.glob("build/*-cpu*"))
    kernels += [load_by_path(folder) for folder in folders if folder.absolute() not in taken]
    for number, kernel in enumerate(kernels):
        line = {
            "folder": Path(str(kernel.__file__)).parent.name,
            "namespace": sys.modules[f"{kernel.__name__}.namespace"].NAMESPACE,
            "loader": number < len(taken),
            "compiled": kernel.build_info()["cpu"]["available"],
            "compared": compare(kernel),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
