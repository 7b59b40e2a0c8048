"""Forms of the Triton kernels that have never run on a GPU. Each is off unless it is asked for.

    apart   scan and answers of a lookup without a sketch in a launch each; apart_kernel.py

Asked for by GRACE_KERNELS_TRITON_FORMS or, in tests, by `use`. A form that is measured to be faster
becomes what answers; benchmarks/results/tuning.md has what was predicted.
"""

from __future__ import annotations

import os
from dataclasses import replace

from .tiles import Tile

KNOWN = ("apart",)
REGISTERS = 128
"""Of a thread of a scan of up to 16 queries, 4 of float32, on sm_90. None spills with it (`make
check-aot`), where all in one kernel would; twice as many programs have room in a multiprocessor."""

_VARIABLE = "GRACE_KERNELS_TRITON_FORMS"
_FILE = 65536  # registers of a multiprocessor
_SHARED = 227 << 10  # bytes of its shared memory
_chosen: frozenset[str] | None = None  # the environment has not been asked yet


def use(names: str) -> None:
    """Let forms be in use from now on: names with commas between them, "" for none.

    Raises:
        ValueError: a name is not known.
    """
    global _chosen
    chosen = frozenset(filter(None, names.split(",")))
    for name in sorted(chosen - set(KNOWN)):
        raise ValueError(f"{_VARIABLE} must be some of {', '.join(KNOWN)}, got {name}")
    _chosen = chosen


def apart() -> bool:
    """Tell whether scan and answers are launches of their own."""
    if _chosen is None:
        use(os.environ.get(_VARIABLE, ""))
    return "apart" in (_chosen or ())


def registers(capability: tuple[int, int], tile: Tile, element_size: int) -> int | None:
    """Return how many registers a thread that only scans may have (None: as many as it likes)."""
    fits = tile.direct or (tile.queries == 16 and element_size == 2)
    return REGISTERS if fits and capability == (9, 0) else None


def scanning(capability: tuple[int, int], tile: Tile, element_size: int) -> Tile:
    """Return a tile with as many programs per multiprocessor as a kernel that only scans allows."""
    if registers(capability, tile, element_size) is None:
        return tile
    rows = tile.keys + tile.queries
    shared = (tile.stages - 1) * rows * tile.elements * element_size + 4608
    programs = min(_FILE // (REGISTERS * 32 * tile.warps), _SHARED // shared)
    return replace(tile, resident=max(tile.resident, programs))
