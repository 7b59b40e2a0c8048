"""`grace bench` and `grace plot`: the benchmarks, which are a package of their own."""

from __future__ import annotations

import importlib
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..progress import counter
from ..terminal import number, screen, table
from .output import FAILED, OK, USAGE, CommandError, print_json, quiet

PACKAGE = "grace_bench"


def package(module: str) -> Any:
    """Import a module of the benchmarks: those of the checkout this file is in, or the installed.

    Raises:
        CommandError: there are none, or they need something that is not there.
    """
    beside = Path(__file__).parents[3] / "benchmarks"
    if PACKAGE not in sys.modules and (beside / "suite.py").exists():
        spec = importlib.util.spec_from_file_location(
            PACKAGE, beside / "__init__.py", submodule_search_locations=[str(beside)]
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules[PACKAGE] = made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
    try:
        return importlib.import_module(f"{PACKAGE}.{module}")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == PACKAGE:
            raise CommandError(
                USAGE, "the benchmarks are not installed: reinstall grace-kernels"
            ) from error
        if missing.startswith("grace"):
            raise
        raise CommandError(
            USAGE, f'this needs {error.name}: pip install "grace-kernels[bench]"'
        ) from error


def bench(
    out: Path,
    *,
    quick: bool,
    threads: int | None,
    parts: Sequence[str],
    activations: Path | None,
    as_json: bool,
) -> int:
    """Measure, write CSV, JSON, page and pictures, and print the ratios."""
    suite, rows, page = (package(name) for name in ("suite", "rows", "page"))
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise CommandError(USAGE, f"--threads must be at least 1, got {threads}")
    unknown = [part for part in parts if part not in suite.PARTS]
    if unknown:
        known = ", ".join(suite.PARTS)
        raise CommandError(USAGE, f"--parts must be among {known}, got {', '.join(unknown)}")
    settings = rows.Settings(quick=quick, threads=threads, activations=activations)
    told = ["grace", "bench", *(["--quick"] if quick else []), "--threads", str(threads)]
    told += ["--parts", ",".join(parts)] if parts else []
    out.mkdir(parents=True, exist_ok=True)  # before half an hour of work
    files: list[Path] = []
    found: list[Any] = []
    console = screen(stderr=as_json)
    with quiet():
        for stem, run in suite.runs(
            settings, parts or list(suite.PARTS), counter, shlex.join(told)
        ):
            files += rows.write(run, out, stem)
            found.append((stem, run))
            files += _pictures(out / f"{stem}.csv", out)
    (out / "performance.md").write_text(page.page(found, {file.name for file in files}))
    files.append(out / "performance.md")
    ours = [row for _, run in found for row in run.rows if row.kind == "ours"]
    wrong = [row for row in ours if row.answers == "wrong"]
    if as_json:
        told_runs = {
            stem: {"environment": run.environment, "rows": [asdict(row) for row in run.rows]}
            for stem, run in found
        }
        print_json({"ok": not wrong, "files": [str(file) for file in files], "runs": told_runs})
    else:
        for _, run in found:
            _show(console, page.goals(run.rows))
        console.print("\n".join(str(file) for file in files))
        for row in wrong:
            console.print(f"WRONG: {row.part} {row.name} {row.keys} x {row.width}: {row.note}")
    return FAILED if wrong else OK


def _show(console: Any, goals: Sequence[Any]) -> None:
    """Print what was reached of what was to be reached; nothing where nothing was measured."""
    cells = [
        (goal.text, goal.met, goal.total, number(goal.worst), goal.where)
        for goal in goals
        if goal.total
    ]
    if cells:
        console.print(table(("goal", "met in", "of", "farthest off", "where"), cells))


def _pictures(file: Path, out: Path) -> list[Path]:
    """Draw the pictures, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    drawn: list[Path] = package("pictures").draw(package("rows").read(file), out, file.stem)
    return drawn


def plot(file: Path, out: Path | None, *, as_json: bool) -> int:
    """Draw the pictures of a run anew, from its CSV."""
    if not file.exists():
        raise FileNotFoundError(2, "no such file", str(file))
    pictures, rows = package("pictures"), package("rows")
    run = rows.read(file)
    try:
        drawn = pictures.draw(run, out or file.parent, file.stem)
    except ModuleNotFoundError as error:
        raise CommandError(
            USAGE, f'this needs {error.name}: pip install "grace-kernels[plot]"'
        ) from error
    if as_json:
        print_json({"files": [str(path) for path in drawn]})
    else:
        for path in drawn:
            print(path)
    return OK
