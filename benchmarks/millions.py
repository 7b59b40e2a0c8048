"""Memory and time of a very large codebook: built, saved, loaded, loaded without a copy.

Each stage is a process of its own, whose peak of resident memory the system tells. Pages of a file
that is mapped count there, although the system takes them back when it needs them; what the process
holds besides at the end is given too.

    python -m benchmarks.millions OUT.json [--entries 1000000] [--dim 4096] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from grace_edit import Codebook
from grace_edit.codebook import store

STAGES = ("build and save", "load", "load mapped")
_PIECE = 1 << 24  # elements drawn at a time


def own_memory() -> int | None:
    """Return bytes of this process's memory that no file stands behind."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    found = [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]
    return int(found[0].split()[1]) * 1024 if found else None


def drawn(entries: int, dim: int, seed: int) -> torch.Tensor:
    """Return `[entries, dim]` bfloat16, clusters of neighbours as activations have them."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(64, dim, generator=generator) * 4
    rows = torch.empty(entries, dim, dtype=torch.bfloat16)
    step = max(1, _PIECE // dim)
    for first in range(0, entries, step):
        piece = rows[first : first + step]
        near = centres[torch.randint(64, (len(piece),), generator=generator)]
        piece.copy_(near + torch.randn(len(piece), dim, generator=generator))
    return rows


def median(call: Any, times: int = 9) -> float:
    """Return the median of seconds that a call with a number takes."""
    taken = []
    for number in range(times):
        start = time.perf_counter()
        call(number)
        taken.append(time.perf_counter() - start)
    return sorted(taken)[times // 2]


def build_and_save(folder: Path, entries: int, dim: int) -> dict[str, Any]:
    """Build a codebook from tensors of which it takes no copy, and save it."""
    keys, values = drawn(entries, dim, 0), drawn(entries, dim, 1)
    start = time.perf_counter()
    labels = [(number,) for number in range(entries)]
    radii = torch.ones(entries)
    book = Codebook.from_tensors(keys, values, radii, labels, copy=False)
    built = time.perf_counter()
    store.save(book, folder, {})
    return {"build_s": built - start, "save_s": time.perf_counter() - built}


def load(folder: Path, entries: int, dim: int, *, mapped: bool) -> dict[str, Any]:
    """Load it and look something up."""
    start = time.perf_counter()
    book, _ = store.load(folder, mapped=mapped)
    loaded = time.perf_counter()
    query = book.keys[entries // 2][None]
    index, distance = book.lookup(query)
    looked = time.perf_counter()
    assert (index.tolist(), distance.tolist()) == ([entries // 2], [0.0])
    seconds = {"load_s": loaded - start, "first_lookup_s": looked - loaded}
    seconds["lookup_ms"] = 1e3 * median(lambda n: book.lookup(book.keys[n][None]))
    return seconds


def stage(name: str, folder: Path, entries: int, dim: int) -> dict[str, Any]:
    """Run one stage in this process."""
    if name == STAGES[0]:
        figures = build_and_save(folder, entries, dim)
    else:
        figures = load(folder, entries, dim, mapped=name == STAGES[2])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**figures, "peak_bytes": peak, "own_bytes_at_the_end": own_memory()}


def main() -> None:
    """Run all stages and write what they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument(
        "--folder", type=Path, help="where the codebook is saved; None: for a while"
    )
    parser.add_argument("--stage", choices=STAGES)
    arguments = parser.parse_args()
    if arguments.stage:
        print(
            json.dumps(stage(arguments.stage, arguments.folder, arguments.entries, arguments.dim))
        )
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        saved = Path(name) / "saved"
        told: dict[str, Any] = {
            "entries": arguments.entries,
            "dim": arguments.dim,
            "tensor_bytes": arguments.entries * arguments.dim * 4,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
            "load_average_before": os.getloadavg()[0],
        }
        for each in STAGES:
            command = [sys.executable, "-m", "benchmarks.millions", str(arguments.out)]
            command += ["--stage", each, "--folder", str(saved)]
            command += ["--entries", str(arguments.entries), "--dim", str(arguments.dim)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            told[each] = json.loads(done.stdout.splitlines()[-1])
            print(each, told[each], flush=True)
        told["load_average_after"] = os.getloadavg()[0]
    arguments.out.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
