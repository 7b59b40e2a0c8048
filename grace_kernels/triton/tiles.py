"""Tiles of the lookup kernel by device, element size and batch, and the error bounds they imply.

No row has been measured on a GPU yet. Each follows from arithmetic: bytes in flight per
multiprocessor (at least 48 KiB), registers (no spills, see `make check-aot`) and shared memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """How a program walks its slice, for batches of at most `batch` queries (None: any).

    Args:
        batch: the largest batch this row is for.
        direct: sum squared differences; otherwise norms and products on tensor cores.
        queries, keys, elements: BLOCK_B, BLOCK_N and BLOCK_D of the kernel.
        groups: candidates kept per query; the slots of a tile are spread over them.
        pairs: whose s is computed together where bounds do not decide.
        warps, stages: of a program; key tiles in flight.
        resident: programs per multiprocessor that the grid is made for.
    """

    batch: int | None
    direct: bool
    queries: int
    keys: int
    elements: int
    groups: int
    pairs: int
    warps: int
    stages: int
    resident: int


@dataclass(frozen=True)
class Sketched:
    """How a program that has a sketch sketches its queries and walks the codes of its slice.

    Args:
        elements: of its queries that are sketched at a time, BLOCK_E.
        slots, stages: whose head codes are read at a time, SCAN_N, and tiles of those in flight.
        room: for survivors, pairs that the head may leave; at least 32 per query.
        chunk: of those, looked at together.
    """

    elements: int
    slots: int
    stages: int
    room: int
    chunk: int


# By queries of a tile. 64 directions times queries times elements are 64 registers of a thread
# (direct). Slots: ten codes each, so that a stage is 5 KiB.
_SKETCHED = {
    1: Sketched(128, 512, 4, 2048, 32),
    2: Sketched(64, 512, 4, 2048, 32),
    4: Sketched(32, 512, 4, 2048, 32),
    16: Sketched(64, 128, 4, 4096, 16),
    32: Sketched(64, 64, 4, 4096, 16),
    64: Sketched(32, 64, 4, 4096, 16),
}


# Direct: 3 instructions per element and query, which hide behind the loads of four queries or so.
# Dot: 64 keys against up to 32 queries; against 64, where the queries' own traffic would equal the
# keys', 128. All rows keep within 255 registers, which two programs of four warps can have.
# Shared memory: sm_90 and sm_100 have 227 KiB, sm_80 163 KiB, its smaller relatives 99 KiB.
_SM90 = {
    2: (
        Tile(1, True, 1, 16, 256, 16, 4, 4, 8, 2),
        Tile(2, True, 2, 16, 256, 16, 4, 4, 6, 2),
        Tile(4, True, 4, 8, 256, 8, 4, 4, 8, 2),
        Tile(16, False, 16, 64, 128, 16, 16, 4, 4, 2),
        Tile(32, False, 32, 64, 128, 16, 16, 4, 4, 2),
        Tile(None, False, 64, 128, 64, 8, 16, 8, 4, 1),
    ),
    4: (
        Tile(1, True, 1, 16, 256, 16, 8, 4, 5, 2),
        Tile(2, True, 2, 16, 256, 16, 8, 4, 4, 2),
        Tile(4, True, 4, 8, 256, 8, 8, 4, 6, 2),
        Tile(16, False, 16, 64, 32, 16, 8, 4, 6, 2),
        Tile(None, False, 32, 64, 32, 16, 16, 8, 8, 1),
    ),
}
_SM80 = {
    2: (
        Tile(1, True, 1, 16, 256, 16, 4, 4, 6, 2),
        Tile(2, True, 2, 16, 256, 16, 8, 4, 4, 2),
        Tile(4, True, 4, 8, 256, 8, 8, 4, 6, 2),
        Tile(16, False, 16, 64, 128, 16, 16, 4, 3, 2),
        Tile(32, False, 32, 64, 64, 16, 16, 4, 4, 2),
        Tile(None, False, 64, 128, 64, 8, 16, 8, 3, 1),
    ),
    4: (
        Tile(1, True, 1, 16, 256, 16, 8, 4, 3, 2),
        Tile(2, True, 2, 16, 256, 16, 8, 4, 3, 2),
        Tile(4, True, 4, 8, 256, 8, 8, 4, 4, 2),
        Tile(16, False, 16, 64, 32, 16, 8, 4, 4, 2),
        Tile(None, False, 32, 64, 32, 16, 16, 8, 6, 1),
    ),
}

_SM100 = {
    2: (
        *_SM90[2][:4],
        Tile(32, False, 32, 64, 64, 16, 16, 4, 4, 2),
        Tile(None, False, 64, 64, 64, 8, 16, 8, 4, 1),
    ),
    4: _SM90[4],
}


def table(capability: tuple[int, int]) -> dict[int, tuple[Tile, ...]]:
    """Return the tiles for a compute capability: element size in bytes to rows, smallest first."""
    return {(9, 0): _SM90, (10, 0): _SM100, (10, 3): _SM100}.get(capability, _SM80)


def choose(capability: tuple[int, int], element_size: int, batch: int) -> Tile:
    """Return the first row of the table that takes `batch` queries at once."""
    rows = table(capability)[element_size]
    return next(tile for tile in rows if tile.batch is None or batch <= tile.batch)


def sketched(tile: Tile) -> Sketched:
    """Return how a program with this tile uses a sketch."""
    return _SKETCHED[tile.queries]


def precision(element_size: int) -> str:
    """Return how products of elements are formed; those of 16-bit elements are exact."""
    return "tf32x3" if element_size == 4 else "ieee"


def error_bound(
    tile: Tile, dim: int, element_size: int, norm_elements: int = 128
) -> tuple[float, float]:
    """Return (relative, absolute) such that |coarse - s| <= relative * size + absolute.

    `size` is the coarse result itself (direct, Lemma 9) or |x|^2 + |k|^2 (dot, Lemma 10), for which
    a program squares `norm_elements` of the query at a time. See docs/error-bounds.md.
    """
    u = 2.0**-24
    chunks = -(-dim // tile.elements)
    if dim > 1 << 20:  # beyond what the first-order terms are good for: everything is computed
        return 1.0, math.inf
    if tile.direct:
        m = chunks + tile.elements + 4
        return 1.25 * m * u / (1 - m * u) + 2.0**-20, (dim + 16) * 2.0**-147
    norms = max(chunks + max(tile.elements, 128), -(-dim // norm_elements) + norm_elements) + 3
    steps = tile.elements / 16 if element_size == 2 else 3 * tile.elements / 8
    products = steps * 2.0**-18.8 + (chunks + 2) * u + (2.0**-18 if element_size == 4 else 0)
    return 1.1 * (norms * u + products + 4 * u) + 2.0**-20, (dim + 16) * 2.0**-120


def sketch_bound(tile: Tile, dim: int) -> tuple[float, float]:
    """Return (norm_error, spread), bounds of what a query's sketch loses to rounding (Lemma 19).

    Of y = x - c as rounded, the kernel computes |y|^2, within norm_error of it relatively, and the
    64 coordinates P y: all of them together are within `spread` |y| of P (x - c).
    """
    u = 2.0**-24
    elements = sketched(tile).elements
    chunks = -(-dim // elements)
    m = chunks + elements + 3
    if dim > 1 << 20:  # as in error_bound: no query can be sketched
        return math.inf, math.inf
    norm_error = m * u / (1 - m * u)
    if tile.direct:
        return norm_error, 1.05 * (u + 8 * norm_error)
    product = 1.02 * elements / 16 * 2.0**-18.8 + (2 * chunks + 2) * u
    return norm_error, 1.05 * (u + 2.0**-14 + 8 * 1.1 * product)
