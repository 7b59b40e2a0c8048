"""Tiles of the lookup kernel by device, element size and problem, and the error bounds they imply.

Rows with `slots` were chosen by measurements, see `_SWEPT`. The others follow from arithmetic:
bytes in flight per multiprocessor (at least 48 KiB), registers (no spills, see `make check-aot`)
and shared memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """How a program walks its slice, and for which problems this is the row of the table.

    Args:
        batch: the largest batch this row is for (None: any).
        direct: sum squared differences; otherwise norms and products on tensor cores.
        queries, keys, elements: BLOCK_B, BLOCK_N and BLOCK_D of the kernel.
        groups: candidates kept per query; the slots of a tile are spread over them.
        pairs: whose s is computed together where bounds do not decide.
        warps, stages: of a program; key tiles in flight.
        resident: programs per multiprocessor that the grid is made for.
        slots: the fewest keys that this row is for.
        width: the widest keys that this row is for (None: any).
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
    slots: int = 0
    width: int | None = None


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


# 1,000 keys were not swept, 10,000 were: half way. Tiles of 128 keys leave most multiprocessors of
# an H100 without a slice of 1,000.
_SWEPT_SLOTS = 3200

# Direct: 3 instructions per element and query, which hide behind the loads of four queries or so.
# Dot: 64 keys against up to 32 queries; against 64, where the queries' own traffic would equal the
# keys', 128. All rows keep within 255 registers, which two programs of four warps can have.
# Shared memory: sm_90 and sm_100 have 227 KiB, sm_80 163 KiB, its smaller relatives 99 KiB.
_SM90_FEW = {
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

# What 1,352 timings of tiles on an H100 left (bf16, isotropic keys, 10,000 and 100,000 x 768 and
# 100,000 x 4096; benchmarks/results/nvidia-h100-4727689-triton-sweep.csv). Of the tiles that ran in
# every problem of a batch: that with the least geometric mean of its time relative to the fastest
# one of each problem; by width where two tiles are each ahead by 10 % on one side. None is slower
# than the tile before in any problem. us for 10,000 x 768, 100,000 x 768, 100,000 x 4096:
_SWEPT = (
    # 1 query: 19.4, 80.2, (375) against 23.4, 99.6, 379. Two to four queries fill the same tile,
    # and 8 of them took 20.9 and 88.9, where the direct form took more for one. 1774 is half way.
    Tile(4, False, 16, 128, 128, 16, 16, 8, 3, 1, _SWEPT_SLOTS, 1774),
    # 1 query, wide keys: (23.3, 92.1), 334.4 against 379.4.
    Tile(1, True, 1, 16, 512, 16, 4, 4, 4, 2, _SWEPT_SLOTS),
    # Two to four queries of wide keys were not swept: as before.
    Tile(2, True, 2, 16, 256, 16, 4, 4, 6, 2, _SWEPT_SLOTS),
    Tile(4, True, 4, 8, 256, 8, 4, 4, 8, 2, _SWEPT_SLOTS),
    # 8 queries: 20.9, 88.9, 431.8 against 24.3, 96.1, 480.6.
    Tile(16, False, 16, 128, 128, 16, 16, 8, 3, 1, _SWEPT_SLOTS),
    # Timed with 64 queries, as two blocks of 32: -, 160.1, 756.0 against 171.3, 830.8.
    Tile(32, False, 32, 128, 128, 16, 16, 8, 3, 1, _SWEPT_SLOTS),
    # 64 queries: -, 144.8, 779.6 against 148.0, 797.6. 180 is half way to 512.
    Tile(180, False, 64, 128, 128, 8, 16, 8, 3, 1, _SWEPT_SLOTS),
    # 512 queries: -, 527.9, 2623 against 597.9, 2700.
    Tile(None, False, 64, 64, 128, 4, 16, 4, 3, 2, _SWEPT_SLOTS),
)
_SM90 = {2: (*_SWEPT, *_SM90_FEW[2]), 4: _SM90_FEW[4]}
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
        *_SM90_FEW[2][:4],
        Tile(32, False, 32, 64, 64, 16, 16, 4, 4, 2),
        Tile(None, False, 64, 64, 64, 8, 16, 8, 4, 1),
    ),
    4: _SM90_FEW[4],
}


def table(capability: tuple[int, int]) -> dict[int, tuple[Tile, ...]]:
    """Return the tiles for a compute capability: element size in bytes to rows."""
    return {(9, 0): _SM90, (10, 0): _SM100, (10, 3): _SM100}.get(capability, _SM80)


def choose(
    capability: tuple[int, int], element_size: int, batch: int, slots: int = 0, dim: int = 0
) -> Tile:
    """Return the first row of the table that takes `batch` queries at once of so many keys.

    Args:
        capability, element_size: of the GPU and of a key's element, in bytes.
        batch: queries.
        slots: keys that every query is compared with; 0 with a sketch, which leaves few, and with
            which no tile was measured beside another.
        dim: their width.
    """
    return next(
        tile
        for tile in table(capability)[element_size]
        if (tile.batch is None or batch <= tile.batch)
        and slots >= tile.slots
        and (tile.width is None or dim <= tile.width)
    )


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
