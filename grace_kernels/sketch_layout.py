"""Where the numbers of a sketch stand: said here for Python, in `csrc/sketch_layout.h` for C++.

The sketch of a slot is 66 int8 codes: of the residual, of the error and of 64 coordinates. A code
times its scale is the number. 32 slots are a block, in which the codes for one number are
neighbours; the residuals, errors and first 8 coordinates of a block are its head, which a lookup
always reads, and the other coordinates its tail. `grace_kernels.Sketch` says what the tensors mean.
"""

from __future__ import annotations

import torch

DIRECTIONS = 64  # and as many coordinates
HEAD = 8  # coordinates in the head
BLOCK = 32  # slots
OUTLIERS = 32  # slots whose radii may exceed radius_bound
UNKNOWN = 127  # code of an error that has no bound
COUNTERS = ("queries", "pairs", "scored", "scanned")

# The order of the codes of a slot, and of the scales.
RESIDUAL, ERROR, COORDINATES = 0, 1, 2
HEAD_NUMBERS = COORDINATES + HEAD
TAIL_NUMBERS = DIRECTIONS - HEAD
MIDDLE = COORDINATES + DIRECTIONS  # one scale more: what is to be added to every residual


def layout(dim: int, blocks: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of each tensor by name, in the order in which operators take them.

    Args:
        dim: D, the width of keys.
        blocks: that there is memory for.
    """
    return {
        "centre": ((dim,), torch.float32),
        "directions": ((DIRECTIONS, dim), torch.bfloat16),
        "scales": ((MIDDLE + 1,), torch.float32),
        "head": ((blocks, HEAD_NUMBERS, BLOCK), torch.int8),
        "tail": ((blocks, TAIL_NUMBERS, BLOCK), torch.int8),
        "covered": ((), torch.int64),
        "radius_bound": ((), torch.float32),
        "outliers": ((OUTLIERS,), torch.int64),
        "counters": ((len(COUNTERS),), torch.int64),
    }


NAMES = tuple(layout(0, 0))
