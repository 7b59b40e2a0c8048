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
        groups: candidates kept per query; the rows of a tile are spread over them.
        pairs: rows whose s is computed together where bounds do not decide.
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


def precision(element_size: int) -> str:
    """Return how products of elements are formed; those of 16-bit elements are exact."""
    return "tf32x3" if element_size == 4 else "ieee"


def error_bound(tile: Tile, dim: int, element_size: int) -> tuple[float, float]:
    """Return (relative, absolute) such that |coarse - s| <= relative * size + absolute.

    `size` is the coarse result itself (direct) or |x|^2 + |k|^2 (dot). With u = 2^-24, S the exact
    sum of squares and s its canonical value, which is within 2^-23 of it:

    * direct: a difference carries one rounding (twice, being squared), the square one, and at most
      `dim / elements + elements` additions follow in whatever order, so c is within g S, g = m u /
      (1 - m u), m = dim / elements + elements + 4. 1.25 g covers the step from S to c.
    * dot: squares and additions of the norms as above. Products of 16-bit elements are exact;
      those of float32 taken as three of tf32 lose at most 2^-18. A step of a tensor core adds 16
      (tf32: 8) products to its accumulator and errs by at most 2^-18.8 of the sum of magnitudes:
      17 addends, each cut off at the 24th bit of the largest, with as much again for doing it in
      two halves and for the cut of the sum. Measured on V100 to H100 by Fasi, Higham, Mikaitis and
      Pranesh (PeerJ CS 2021) and their successors, the cuts are there or lower. All magnitudes
      together are at most |x| |k| <= (|x|^2 + |k|^2) / 2, and twice x.k enters.

    What underflows is less than 2^-123 per element, also where a unit flushes subnormal numbers.
    Both bounds have room for the rounding of the bounds themselves.
    """
    u = 2.0**-24
    chunks = -(-dim // tile.elements)
    if dim > 1 << 20:  # beyond what the first-order terms are good for: everything is computed
        return 1.0, math.inf
    if tile.direct:
        m = chunks + tile.elements + 4
        return 1.25 * m * u / (1 - m * u) + 2.0**-20, (dim + 16) * 2.0**-147
    norms = (chunks + max(tile.elements, 128) + 3) * u
    steps = tile.elements / 16 if element_size == 2 else 3 * tile.elements / 8
    products = steps * 2.0**-18.8 + (chunks + 2) * u + (2.0**-18 if element_size == 4 else 0)
    return 1.1 * (norms + products + 4 * u) + 2.0**-20, (dim + 16) * 2.0**-120
