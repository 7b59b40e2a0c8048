"""The run on a GPU: gpu-check's bench stage in a process of its own, its times as rows."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .gpu_check.journal import Journal
from .gpu_check.peers import PACKAGES, installed
from .gpu_check.picture import OURS
from .gpu_check.place import slug
from .gpu_check.report import merged
from .rows import Progress, Row, Run, Settings

ROOT = Path(__file__).parents[1]


def run(settings: Settings, progress: Progress) -> tuple[str, Run]:
    """Measure on the GPU; return the run and its name, which begins with `cuda-`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        command = [sys.executable, "-m", f"{Path(__file__).parent.name}.gpu_check"]
        command += ["--out", str(out), "--stages", "bench"]
        command += ["--quick", "--budget", "100"] if settings.quick else []
        paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)},
            capture_output=True,
            text=True,
        )
        progress(1, 1)
        file = out / "rows.jsonl"
        if not file.exists():
            why = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            return "cuda", Run({}, [Row("lookup", "cuda", answers="absent", note=why[:200])])
        return as_run(Journal(file))


def as_run(journal: Journal) -> tuple[str, Run]:
    """Return the run of a journal, and its name."""
    about: dict[str, Any] = journal.runs()[-1]["about"]
    device = "rehearsal" if about["rehearsal"] else "cuda"
    found = [*_lookups(journal, device), *_pruned(journal, device)]
    missing = [name for name in PACKAGES if name not in installed()]
    found += [
        Row(
            "lookup", device, kind="peer", name=name, answers="absent",
            note=f"not installed: pip install {name}",
        )
        for name in missing
    ]  # fmt: skip
    return f"{device}-{slug(about['device'])}", Run(about, found)


def _lookups(journal: Journal, device: str) -> Iterator[Row]:
    """Yield a row per shape, column and kind of time, and the roof of each shape."""
    for shape in merged(journal):
        columns = {
            "part": shape["op"], "device": device, "data": "isotropic", "dtype": shape["dtype"],
            "keys": shape["N"], "width": shape["D"], "batch": shape["B"],
        }  # fmt: skip
        for name, column in shape["columns"].items():
            yield from _column(name, column, columns, "ours" if name in OURS else "peer")
        if "roof us" in shape:
            told = {"kind": "bound", "name": "roof", "unit": "us", "cache": "cold"}
            yield Row(**columns, **told, median=shape["roof us"], note=shape["bound by"])


def _pruned(journal: Journal, device: str) -> Iterator[Row]:
    for record in journal.rows("bench").values():
        result = record.get("result") or {}
        if "pruned columns" not in result:
            continue
        columns = {
            "part": "pruned", "device": device, "dtype": result["dtype"], "keys": result["N"],
            "width": result["D"], "batch": result["B"],
            "data": "isotropic, all cover" if result["worst"] else "activations",
        }  # fmt: skip
        for name, column in result["pruned columns"].items():
            backend, _, sketch = name.partition(" ")
            told = f"{backend}, sketch" if sketch else backend
            yield from _column(told, column, columns, "ours")


def _column(name: str, column: dict[str, Any], columns: dict[str, Any], kind: str) -> Iterator[Row]:
    verdict = column.get("verdict", "")
    answers = "exact" if kind == "ours" and verdict == "right" else _answers(verdict)
    caches = [cache for cache in ("cold", "warm", "eager") if cache in column]
    for cache in caches:
        took = column[cache]
        yield Row(
            **columns, kind=kind, name=name, answers=answers, cache=cache, unit="us",
            median=took["us"], p20=took["p20"], p80=took["p80"],
            note="" if verdict == "right" else verdict,
        )  # fmt: skip
    if not caches:
        why = column.get("error") or verdict or "not timed"
        yield Row(**columns, kind=kind, name=name, answers="absent", note=why[:200])


def _answers(verdict: str) -> str:
    """Peers are compared with a tolerance, so that none of them is called exact."""
    return "rounded" if verdict == "right" or verdict.startswith("right indices") else "wrong"
