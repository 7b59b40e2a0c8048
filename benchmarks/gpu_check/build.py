"""Stage `build`: the compiled libraries on this machine, and what the package says of itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grace_kernels

from . import process, warm
from .journal import ROOT, CutOff, Row, Skipped, Wrong
from .place import Place, build_libraries

LIBRARIES = ("_C.so", "_C_cuda.so")
_SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


def rows(place: Place, log: Path) -> list[Row]:
    """Return the rows of this stage."""
    if not place.gpu:
        return [Row("what answers", lambda: _judged(grace_kernels.build_info(), ("cpu",)))]

    def missing() -> bool:
        return not set(LIBRARIES) <= set(build_libraries())

    return [
        Row("compile", lambda: _compile(place, log), limit=600, again=missing),
        Row("no spills", lambda: _no_spills(log), again=missing),
        Row(
            "triton compiles",
            lambda: warm.row(place, log),
            limit=300,
            again=lambda: not warm.marker().exists(),
        ),
        # Read by a process that starts after the build.
        Row("what answers", lambda: _what_answers(("cpu", "triton", "cuda")), again=lambda: True),
    ]


def _compile(place: Place, log: Path) -> dict[str, Any]:
    """Build in place; what the compilers say goes to the log."""
    start = time.monotonic()
    # The library of an earlier build must not pass for this one's; unchanged objects are reused.
    for name in LIBRARIES:
        (ROOT / "grace_kernels" / name).unlink(missing_ok=True)
    limit = place.remaining() - 3
    said, status = process.run([sys.executable, "setup.py", "build_ext", "--inplace"], limit)
    with log.open("a") as file:
        file.write(f"--- build\n{said}\n")
    if status is None:
        raise CutOff(f"the build did not end within {limit:.0f} s")
    built = build_libraries()
    result = {"seconds": round(time.monotonic() - start, 1), "libraries": ", ".join(built)}
    if status != 0:
        raise Wrong(f"status {status}: {said[-1500:]}", result)
    if not set(LIBRARIES) <= set(built):
        raise Wrong(f"{', '.join(LIBRARIES)} must be built, got {built}", result)
    return result


def _no_spills(log: Path) -> dict[str, Any]:
    """Add up what ptxas reports in the log, if the build asked it to."""
    text = log.read_text(errors="replace") if log.exists() else ""
    found = [(int(a), int(b)) for a, b in _SPILL.findall(text.rpartition("--- build")[2])]
    if not found:
        raise Skipped("the build printed no report of ptxas")
    result = {
        "kernels": len(found),
        "spill stores": sum(a for a, _ in found),
        "spill loads": sum(b for _, b in found),
    }
    if result["spill stores"] or result["spill loads"]:
        raise Wrong("registers are spilled", result)
    return result


def _what_answers(wanted: tuple[str, ...]) -> dict[str, Any]:
    """Ask a fresh process, which loads the libraries as they are now."""
    code = "import json, grace_kernels; print(json.dumps(grace_kernels.build_info(), default=str))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    if done.returncode != 0:
        raise Wrong(done.stderr[-1500:])
    return _judged(json.loads(done.stdout.splitlines()[-1]), wanted)


def _judged(info: dict[str, Any], wanted: tuple[str, ...]) -> dict[str, Any]:
    lacking = [
        name
        for name in wanted
        if not (isinstance(info.get(name), dict) and info[name].get("available"))
    ]
    result = {"chosen": info.get("chosen"), "info": info}
    if lacking:
        raise Wrong(f"build_info() must list {', '.join(lacking)} as available", result)
    return result
