"""The Triton kernels compiled for GPUs that are not here: what `make check-aot` checks, in part."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
CHECK = Path(__file__).with_name("check_aot.py")


def python(*arguments: str, package: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run Python, with triton compiling."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(package), str(CHECK.parent)])
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=600
    )


@pytest.mark.parametrize(
    "which",
    [
        "--arch 90 --dtype bfloat16 --operation lookup",
        "--arch 90 --dtype float32 --operation lookup",
        "--arch 90 --dtype float16 --operation apart --first-row",
        "--arch 80 100 --dtype bfloat16 --operation lookup --first-row",
    ],
)
def test_every_tile_compiles_without_spills_and_scans_in_wide_loads(
    which: str, tmp_path: Path
) -> None:
    done = python(str(CHECK), *which.split(), "--json", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert len(report) > 0
    for row in report:
        assert row["spill_bytes"] == 0
        assert row["registers"] > 32
        assert row["key_loops"] > 0


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("enable_fp_fusion=False", "fused fp64"),
        ('sem="acq_rel"', "no a counter with acquire and release"),
    ],
)
def test_the_check_sees_what_the_interpreter_cannot(
    change: str, fault: str, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "grace_kernels", tmp_path / "grace_kernels")
    folder = tmp_path / "grace_kernels" / "triton"
    changed = {"enable_fp_fusion=False": "enable_fp_fusion=True", 'sem="acq_rel"': 'sem="relaxed"'}
    for path in (folder / "lookup.py", folder / "lookup_kernel.py"):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(change, changed[change]), encoding="utf-8")
    which = "--arch 90 --dtype bfloat16 --operation lookup --first-row"
    done = python(str(CHECK), *which.split(), package=tmp_path)
    assert done.returncode == 1
    assert fault in done.stderr


def test_a_process_compiles_few_kernels_whatever_it_is_given() -> None:
    done = python(
        "-c",
        textwrap.dedent(
            """
            import itertools
            import torch
            import check_aot
            from triton import knobs
            from triton.runtime import driver
            from grace_kernels.sketch import Sketch
            from grace_kernels.triton import lookup as launcher

            driver.set_active(check_aot.Pretended(90))
            launcher.machine = lambda device: ((9, 0), 132)
            kernels = set()

            def compiles(*, key, fn, **about):
                kernels.add((id(fn.jit_function), key))
                return True  # and does not: what would be compiled is what is counted

            knobs.runtime.jit_cache_hook = compiles

            def rows(n, width, layout, dtype=torch.float32):
                if layout == "turned":
                    return torch.zeros(width, n, dtype=dtype).t()
                gap, shift = {"plain": (0, 0), "odd": (5, 0), "wide": (32, 0), "shifted": (0, 3)}[
                    layout
                ]
                flat = torch.zeros(n * (width + gap) + 64, dtype=dtype)[shift:]
                return flat.as_strided((n, width), (width + gap, 1), shift)

            def serve(entries=16, batch=8, dim=64, width=32, keys="plain", source="plain",
                      values="plain", hidden="plain", shift=0, counted=True, into=40):
                keys, values = rows(entries, dim, keys), rows(entries, width, values)
                source, hidden = rows(into, dim, source), rows(into, width, hidden)
                numbers = torch.zeros(batch + 1, dtype=torch.int64)[shift : batch + shift]
                radii = torch.zeros(entries + 1)[shift : entries + shift]
                count = torch.tensor([0, entries])[1] if counted else None
                launcher.adapt_(
                    hidden, source, numbers, numbers, numbers, keys, radii, values, count
                )
                query = source[:1].expand(batch, dim)
                launcher.lookup(query, keys, radii, count)
                launcher.nearest(query, keys, radii, count)

            for how in ({}, {"entries": 1}, {"entries": 17}, {"entries": 3000}, {"batch": 5},
                        {"batch": 16, "shift": 1}, {"into": 41}, {"into": 1}, {"counted": False},
                        {"keys": "wide"}, {"values": "wide", "hidden": "wide"}, {"dim": 128},
                        {"width": 64}):
                serve(**how)
                assert len(kernels) == 1, (how, len(kernels))
            for width, values, hidden in itertools.product(
                (1, 7, 32), ("plain", "odd", "shifted", "turned"), ("plain", "odd", "turned")
            ):
                serve(width=width, values=values, hidden=hidden)
                assert len(kernels) <= 2, (width, values, hidden, len(kernels))
            assert len(kernels) == 2
            for dim, keys, source, width, hidden in itertools.product(
                (1, 2, 16, 31), ("plain", "odd", "shifted"), ("plain", "odd", "shifted"), (1, 32),
                ("plain", "turned"),
            ):
                serve(dim=dim, keys=keys, source=source, width=width, hidden=hidden)
                assert len(kernels) <= 3, (dim, keys, source, width, hidden, len(kernels))
            assert len(kernels) == 3
            for entries, batch in ((16, 2), (4000, 2), (4000, 8)):  # one has no tile for many keys
                serve(entries=entries, batch=batch)
            assert len(kernels) == 4, "another tile is another kernel"

            kernels.clear()
            for dim, counted, shift in itertools.product((64, 128, 33, 1), (True, False), (0, 1)):
                sketch = Sketch(96, dim, torch.float32).tensors()
                keys, query = torch.zeros(96, dim), torch.zeros(8 * dim + 1)[shift:]
                launcher.pruned_lookup(query[: 8 * dim].view(8, dim), keys, torch.zeros(96),
                                       torch.tensor(9) if counted else None, *sketch)
            assert len(kernels) == 2, kernels
            """
        ),
    )
    assert done.returncode == 0, done.stderr
