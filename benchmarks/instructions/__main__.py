"""Count the instructions of fixed lookups with valgrind and compare them with committed figures.

The kernels of csrc/cpu are compiled with a driver that answers one case, without torch, and run
under callgrind, which counts within the lookup alone. A count says nothing of time and hardly
depends on the machine, but on compiler and flags, which are committed with it. valgrind knows AVX2
and not AVX-512. Every answer is compared with the reference first.

Usage: python -m benchmarks.instructions [--update] [--strict]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import grace_kernels
from grace_kernels import Sketch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMMITTED = ROOT / "benchmarks" / "results" / "instructions.json"
COMPILER = shlex.split(os.environ.get("CXX", "c++")) or ["c++"]
FLAGS = "-std=c++20 -O3 -g0 -ffp-contract=off -fno-math-errno -Wno-psabi"
MARGIN = 0.02  # of a count: what another compiler release or another fit of a sketch may change
_WITH_TORCH = ("lookup.cpp", "isa.cpp")
_TIMEOUT = 300  # seconds


@dataclass(frozen=True)
class Case:
    """One lookup of bfloat16 keys `[N, D]`, through a sketch or by reading them all."""

    name: str
    query: Tensor
    keys: Tensor
    radii: Tensor
    sketch: Sketch | None = None

    def expected(self) -> tuple[Tensor, Tensor]:
        """Return the reference's index `[B]` and distance `[B]`."""
        ask = grace_kernels.nearest if self.sketch is None else grace_kernels.lookup
        return ask(self.query, self.keys, self.radii, backend="reference")


def cases() -> Iterator[Case]:
    """Make the cases: all keys read to their end, for 1 and 8 queries; a hit through a sketch."""
    for batch in (1, 8):
        keys, query = drawn(10_000, 768, batch)
        yield Case(f"nearest, {batch} of 10000 x 768", query, keys, torch.ones(len(keys)))
    yield pruned_case(100_000, 768)


def drawn(rows: int, dim: int, batch: int, spread: float = 0.0) -> tuple[Tensor, Tensor]:
    """Draw keys and queries; coordinate i has the deviation `(i + 1) ** -spread`."""
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(rows + batch, dim, generator=generator) * torch.arange(1, dim + 1) ** -spread
    return both[:rows].bfloat16(), both[rows:].bfloat16()


def pruned_case(rows: int, dim: int) -> Case:
    """Make a case whose query lies within the radius of the key in the middle, and of no other."""
    keys, noise = drawn(rows, dim, 1, spread=0.5)
    keys *= 8
    query = keys[rows // 2] + 0.1 * noise
    radii = torch.ones(rows)
    name = f"pruned lookup, 1 of {rows} x {dim}"
    return Case(name, query, keys, radii, Sketch.fit(keys, radii))


def compiled(folder: Path, flags: str = FLAGS) -> Path:
    """Compile the driver with the kernels.

    Raises:
        RuntimeError: the compiler failed; holds what it said.
    """
    sources = [p for p in sorted(ROOT.glob("csrc/cpu/*.cpp")) if p.name not in _WITH_TORCH]
    driver = folder / "driver"
    command = [*COMPILER, *flags.split(), f"-I{HERE}", f"-I{ROOT / 'csrc' / 'cpu'}"]
    command += [str(HERE / "driver.cpp"), *map(str, sources), "-o", str(driver)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
    if done.returncode != 0:
        raise RuntimeError(f"the driver must compile, got {done.stderr}")
    return driver


def written(case: Case, file: Path) -> Path:
    """Write a case as the driver reads it."""
    parts = [case.keys, case.query, case.radii]
    if case.sketch is not None:
        s = case.sketch
        parts += [s.centre, s.directions, s.scales, s.head, s.tail]
    places, at = [], 128
    for part in parts:
        places.append(at)
        at += -(-part.nbytes // 64) * 64
    covered = 0 if case.sketch is None else case.sketch.rows
    places += [0] * (8 - len(places))
    with open(file, "wb") as out:
        out.write(struct.pack("<12q", *case.keys.shape, len(case.query), covered, *places))
        for part, place in zip(parts, places, strict=False):
            out.seek(place)
            out.write(part.contiguous().view(torch.uint8).numpy().tobytes())
    return file


def answered(command: list[str], case: Case) -> tuple[str, str]:
    """Run a command that ends in the driver; return the instruction set and what else was said.

    Raises:
        RuntimeError: it failed, or an answer differs from the reference's.
    """
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} must succeed, got {done.stderr}")
    isa, *lines = done.stdout.splitlines()
    index, bits = torch.tensor([list(map(int, line.split())) for line in lines]).T
    right, distance = case.expected()
    if not (torch.equal(index, right) and torch.equal(bits.int(), distance.view(torch.int32))):
        raise RuntimeError(f"{case.name}: answers must be the reference's, got others")
    return isa, done.stderr


def counted(driver: Path, case: Case, file: Path) -> dict[str, Any]:
    """Return the instruction set and the instructions of one case.

    Raises:
        RuntimeError: valgrind failed, or an answer is wrong.
    """
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
    command += ["--collect-atstart=no", "--toggle-collect=grace::cpu::find_*"]
    command += [str(driver), str(file)]
    isa, said = answered(command, case)
    found = re.search(r"Collected : (\d+)", said)
    if found is None or int(found[1]) == 0:
        raise RuntimeError(f"valgrind must say what it collected, got {said}")
    return {"isa": isa, "instructions": int(found[1])}


def compiler() -> str:
    """Return what the compiler calls itself."""
    done = subprocess.run([*COMPILER, "--version"], capture_output=True, text=True, timeout=60)
    return done.stdout.partition("\n")[0]


def measured() -> dict[str, Any]:
    """Count every case; return what is committed."""
    counts = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        driver = compiled(folder)
        for case in cases():
            counts[case.name] = counted(driver, case, written(case, folder / "case"))
    return {"compiler": compiler(), "flags": FLAGS, "margin": MARGIN, "counts": counts}


def report(now: dict[str, Any], committed: dict[str, Any]) -> tuple[list[str], bool]:
    """Return the lines of the report, and whether a count is above its figure by more than the
    margin."""
    margin, lines, above = committed["margin"], [], False
    for name in ("compiler", "flags"):
        if now[name] != committed[name]:
            lines.append(f"{name} {now[name]}, committed with {committed[name]}")
    lines.append(f"{'':36} {'committed':>12} {'now':>12}  ratio")
    for name, count in now["counts"].items():
        before = committed["counts"].get(name)
        mine = count["instructions"]
        if before is None or before["isa"] != count["isa"]:
            lines.append(f"{name:36} {'-':>12} {mine:12}  ({count['isa']}, nothing committed)")
            continue
        ratio = mine / before["instructions"]
        verdict = "  MORE" if ratio > 1 + margin else "  fewer" if ratio < 1 - margin else ""
        above |= ratio > 1 + margin
        lines.append(f"{name:36} {before['instructions']:12} {mine:12}  {ratio:.3f}{verdict}")
    return lines, above


def main() -> int:
    """Count, then print the report or commit the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help=f"write {COMMITTED.name} anew")
    parser.add_argument("--strict", action="store_true", help="exit 1 where a count is above")
    arguments = parser.parse_args()
    missing = [needed for needed in ("valgrind", COMPILER[0]) if shutil.which(needed) is None]
    if not (ROOT / "csrc" / "cpu").exists():
        missing.append("source tree")
    if missing:
        print(f"nothing was counted: there is no {missing[0]} here")
        return int(arguments.strict)
    now = measured()
    if arguments.update:
        COMMITTED.write_text(json.dumps(now, indent=1) + "\n")
    lines, above = report(now, json.loads(COMMITTED.read_text()))
    print("\n".join(lines))
    return int(arguments.strict and above)


if __name__ == "__main__":
    sys.exit(main())
