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
        "--arch 90 --dtype bfloat16 --operation adapt_",
        "--arch 90 --dtype float32 --operation adapt_",
        "--arch 90 --dtype float16 --operation nearest --first-row",
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


def test_neither_more_entries_nor_another_batch_of_a_tile_compiles_anew() -> None:
    done = python(
        "-c",
        textwrap.dedent(
            """
            import torch
            import check_aot
            from grace_kernels.triton import lookup as launcher
            from grace_kernels.triton.lookup_kernel import lookup_kernel
            from triton.runtime import driver

            driver.set_active(check_aot.Pretended(90))
            launcher.machine = lambda device: ((9, 0), 132)

            class Warm:
                def __getitem__(self, grid):
                    return lambda *a, **k: lookup_kernel.warmup(*a, grid=grid, **k)

            launcher.lookup_kernel = Warm()

            def compiled():
                return sum(len(cache[0]) for cache in lookup_kernel.device_caches.values())

            def serve(entries, batch, rows, shift):
                keys, values = torch.zeros(entries, 64), torch.zeros(entries, 32)
                numbers = torch.zeros(batch + 1, dtype=torch.int64)[shift : batch + shift]
                hidden, source = torch.zeros(rows, 32), torch.zeros(rows, 64)
                launcher.adapt_(hidden, source, numbers, numbers, numbers, keys,
                                torch.zeros(entries), values, torch.tensor(entries))

            serve(16, 8, 40, 0)
            assert compiled() == 1, compiled()
            for entries, batch, rows, shift in (
                (1, 8, 40, 0), (17, 8, 40, 0), (3000, 8, 40, 0), (16, 5, 41, 0), (16, 16, 1, 1),
            ):
                serve(entries, batch, rows, shift)
                assert compiled() == 1, (entries, batch, rows, shift)
            serve(16, 2, 40, 0)
            assert compiled() == 2, "another tile is another kernel"
            """
        ),
    )
    assert done.returncode == 0, done.stderr
