"""Compile the Triton kernel ahead of time, without a GPU, and check what comes out.

For each architecture, each element type, each row of the tile table and each operation, compiled
exactly as the launcher would launch it. nearest, lookup and adapt_ are one kernel, and so are the
two operations with a sketch; `apart` is a lookup in that form, two kernels (forms.py), of which the
first one's registers are told. The checks:

* no spills to local memory, shared memory within what a block may have;
* the loops over the keys have no 64-bit floating point, and load or copy keys 16 bytes at a time;
* the exact distance is not fused and flushes nothing, its root is correctly rounded, and arrivals
  are counted with acquire and release.

    python tests/ops/check_aot.py [--arch 90 ...] [--dtype bfloat16 ...] [--operation lookup ...]
        [--first-row] [--json FILE] [--markdown FILE]

Needs triton with the assemblers it ships, and no GPU. Exit status 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from grace_kernels.sketch import Sketch
from grace_kernels.triton import forms, tiles
from grace_kernels.triton import lookup as launcher
from grace_kernels.triton.apart_kernel import answer_kernels, scan_kernels
from grace_kernels.triton.lookup_kernel import lookup_kernels
from grace_kernels.triton.pruned_kernel import pruned_kernels

ARCHITECTURES = (80, 90, 100)
DTYPES = ("bfloat16", "float16", "float32")
OPERATIONS = ("lookup", "pruned_lookup", "apart")
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
SMALL_LIMIT = 99 << 10  # of sm_86, sm_89 and sm_120, which have the rows of sm_80
DIM = 4096
KERNELS = {
    "lookup_kernels": lookup_kernels,
    "pruned_kernels": pruned_kernels,
    "scan_kernels": scan_kernels,
    "answer_kernels": answer_kernels,
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Pretended:
    """A driver for a GPU that is not there, as far as compiling needs one."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # compiled kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass
class Outcome:
    """What was compiled and what came out."""

    architecture: str
    dtype: str
    operation: str
    queries: str
    tile: str
    registers: int = 0
    shared_bytes: int = 0
    spill_bytes: int = 0
    key_loops: int = 0
    wide_loads: int = 0
    faults: list[str] = field(default_factory=list)


def compiled(architecture: int, dtype: torch.dtype, operation: str, tile: tiles.Tile) -> list[Any]:
    """Return the kernels that the launcher launches with a tile, for all queries it takes."""
    driver.set_active(Pretended(architecture))
    made = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **options: made.append(
                self.kernel.warmup(*args, grid=grid, **options)
            )

    capability = (architecture // 10, architecture % 10)
    batch = tile.batch or 4096
    query, keys = torch.zeros(batch, DIM, dtype=dtype), torch.zeros(300, DIM, dtype=dtype)
    codebook = (keys, torch.zeros(300))
    count = torch.tensor(200)
    sketch = Sketch(300, DIM, dtype).tensors() if operation.startswith("pruned") else ()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "machine", lambda device: (capability, 132))
        patch.setattr(tiles, "choose", lambda *_: tile)
        for name, kernels in KERNELS.items():
            patch.setattr(launcher, name, [Recorder(kernel) for kernel in kernels])
        forms.use("apart" if operation == "apart" else "")
        answer = launcher.pruned_lookup if sketch else launcher.lookup
        answer(query, *codebook, count, *sketch)
    return made


def resources(cubin: bytes) -> tuple[int, int]:
    """Return registers per thread and bytes of local memory that are in use, that is, of spills.

    A byte that LLVM reserves and nothing touches is a frame without a spill.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def told(option: str) -> str:
            call = [TOOLS / "cuobjdump", option, file.name]
            return subprocess.run(call, capture_output=True, text=True, check=True).stdout

        found = re.search(r"REG:(\d+) STACK:(\d+)", told("-res-usage"))
        if found is None:
            raise RuntimeError("cuobjdump does not say what the kernel needs")
        registers, frame = int(found.group(1)), int(found.group(2))
        used = frame > 0 and re.search(r"\b(LDL|STL)\b", told("-sass"))
    return registers, frame if used else 0


def loops(ptx: str) -> list[str]:
    """Return the innermost loops, each as its text."""
    lines = ptx.splitlines()
    labels = ((re.match(r"(\$L\w+):", line), i) for i, line in enumerate(lines))
    at = {label.group(1): i for label, i in labels if label}
    spans = []
    for i, line in enumerate(lines):
        jump = re.search(r"\bbra(?:\.uni)?\s+(\$L\w+)", line)
        if jump and at.get(jump.group(1), i) < i:
            spans.append((at[jump.group(1)], i))
    inner = [
        span
        for span in spans
        if not any(span != other and span[0] <= other[0] <= other[1] <= span[1] for other in spans)
    ]
    return ["\n".join(lines[first : last + 1]) for first, last in inner]


def check(architecture: int, dtype: str, operation: str, tile: tiles.Tile) -> Outcome:
    """Compile one row of the table and look at it."""
    name = f"{'direct' if tile.direct else 'dot'} {tile.queries}x{tile.keys}x{tile.elements}"
    batches = "any" if tile.batch is None else str(tile.batch)
    batches += "" if tile.slots == 0 else f", {tile.slots} keys up"
    batches += "" if tile.width is None else f", {tile.width} wide"
    row = Outcome(f"sm_{architecture}", dtype, operation, batches, name)
    size = getattr(torch, dtype).itemsize
    made = compiled(architecture, getattr(torch, dtype), operation, tile)
    needs = [resources(kernel.asm["cubin"]) for kernel in made]
    row.registers, row.spill_bytes = needs[0]
    # To save registers ptxas itself keeps a little of the kernel that answers in memory, once for
    # each query.
    if any(spilled > 64 for _, spilled in needs[1:]):
        row.faults.append("what answers spills")
    row.shared_bytes = made[0].metadata.shared
    if operation == "apart":
        tile = forms.scanning((architecture // 10, architecture % 10), tile, size)
    if row.spill_bytes > 0:
        row.faults.append(f"spills {row.spill_bytes} bytes")
    limit = SHARED_LIMIT[architecture] if architecture != 80 else SMALL_LIMIT
    if row.shared_bytes * tile.resident > SHARED_LIMIT[architecture] or row.shared_bytes > limit:
        row.faults.append(f"needs {row.shared_bytes} bytes of shared memory")

    # A loop over the keys forms products in fp32 or on tensor cores, and loads a tile of keys. What
    # is summed in fp64, in loops of its own, is the exact distance of a few candidates.
    wide_enough = tile.keys * tile.elements * size / (16 * 32 * tile.warps)
    for text in loops(made[0].asm["ptx"]):
        products = re.search(r"wgmma|mma\.sync|tcgen05\.mma|(fma|mul)\S*\.f32", text)
        wide = len(re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\.c[ga]\S* .*, 0x10", text))
        if products and wide >= wide_enough and ".f64" not in text:
            row.key_loops += 1
            row.wide_loads = max(row.wide_loads, wide)
        if re.search(r"wgmma|mma\.sync|tcgen05\.mma", text) and ".f64" in text:
            row.faults.append("fp64 in a loop with tensor cores")
    ptx, one = "\n".join(kernel.asm["ptx"] for kernel in made), len(made) == 1
    for what, pattern, wanted in (
        ("fused fp64", r"fma\S*\.f64", False),
        ("flushing of subnormals", r"\.ftz\b", False),
        ("fp64 products", r"mul\S*\.f64", True),
        ("a correctly rounded root", r"sqrt\.rn\.f32", True),
        ("a counter with acquire and release", r"atom\.global\S*\.acq_rel\S*\.add", one),
        ("loads of partials past the first cache", r"ld\.global\.cg", one),
    ):
        if bool(re.search(pattern, ptx)) != wanted:
            row.faults.append(f"{'no ' if wanted else ''}{what}")
    if row.key_loops == 0:
        row.faults.append("no loop without fp64 loads its tile of keys 16 bytes at a time")
    return row


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--dtype", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--operation", nargs="+", default=OPERATIONS, choices=OPERATIONS)
    parser.add_argument("--first-row", action="store_true", help="only the first row of each table")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    options = parser.parse_args()

    rows = []
    for architecture in options.arch:
        for dtype in options.dtype:
            size = getattr(torch, dtype).itemsize
            table = tiles.table((architecture // 10, architecture % 10))[size]
            for tile in table[: 1 if options.first_row else None]:
                for operation in options.operation:
                    if tile.slots and operation.startswith("pruned"):
                        continue  # few keys are left
                    if operation == "apart" and architecture != 90:
                        continue  # its limit of registers is for this one
                    row = check(architecture, dtype, operation, tile)
                    rows.append(row)
                    print(
                        f"{row.architecture} {row.dtype:8} {row.operation:13} "
                        f"batch {row.queries:>3} {row.tile:18} {row.registers:3} registers "
                        f"{row.shared_bytes:6} B shared  "
                        f"{'; '.join(row.faults) or 'ok'}",
                        file=sys.stderr,
                        flush=True,
                    )
    bad = sum(bool(row.faults) for row in rows)
    versions = f"triton {triton.__version__}, D = {DIM}"
    if options.json:
        told = {"versions": versions, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(rows, versions))
    print(f"{len(rows)} compiled, {bad} with faults ({versions})")
    return 1 if bad else 0


def markdown(rows: list[Outcome], versions: str) -> str:
    """Return the report as a table."""
    lines = [
        "# The Triton kernel, compiled ahead of time",
        "",
        f"Written by `make check-aot` ({versions}); nothing here was run on a GPU.",
        "A tile is its form, queries x keys x elements. `lookup` is `nearest` and `adapt_` too,",
        "and `apart` what scans in that form (sm_90 alone). `ok`: no spills, shared memory",
        "within the limit, a loop over the keys without fp64 that loads 16 bytes at a time.",
        "",
        "| arch | keys | operation | batch up to | tile | registers | shared bytes | spills | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.architecture} | {row.dtype} | {row.operation} | {row.queries} | {row.tile} | "
            f"{row.registers} | {row.shared_bytes} | {row.spill_bytes} | "
            f"{'; '.join(row.faults) or 'ok'} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
