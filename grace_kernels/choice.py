"""Which of the two implementations for GPUs answers which call: a table of measurements.

Source of every row: `benchmarks/results/nvidia-h100-4727689.csv`, 88 cases that both answered on an
H100, caches cold, replayed from a CUDA graph, with the tiles that Triton had then. Where a row ends
between two measured sizes it ends about half way (geometrically), or where the CUDA kernel changes
its own form. By the host's clock the compiled library wins by more: it costs the host 19 us a call,
Triton 79.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shapes:
    """Calls without a sketch that Triton answers sooner than the compiled library.

    Args:
        size: bytes of a key's element.
        batch: queries, from and to (None: any number).
        dim: the least width.
        keys: the most slots (None: any number).
        numbers: the least slots times width.
    """

    size: int
    batch: tuple[int, int | None]
    dim: int
    keys: int | None
    numbers: int

    def __contains__(self, call: tuple[int, int, int, int]) -> bool:
        """Tell whether `(size, batch, keys, dim)` is one of them."""
        size, batch, keys, dim = call
        least, most = self.batch
        return (
            size == self.size
            and least <= batch
            and (most is None or batch <= most)
            and dim >= self.dim
            and (self.keys is None or keys <= self.keys)
            and keys * dim >= self.numbers
        )


# By compute capability. Where there is no entry nothing was measured, and Triton answers.
TRITON_IS_FASTER: dict[tuple[int, int], tuple[Shapes, ...]] = {
    (9, 0): (
        # Measured with 8 queries: 10,000 x 4096 (115 us against 163), 1,000 and 10,000 x 11008 (173
        # against 194, 254 against 645). Few wide rows to a slice starve the tiles of 256 keys. Not
        # at 10,000 x 768 (41 against 31), nor at 100,000 (407 against 357), nor where the compiled
        # library takes CUDA cores: up to 64 KiB of keys for each of 132 multiprocessors.
        Shapes(2, (5, 16), 2048, 32_000, (132 * 64 << 10) // 2 + 1),
        # Measured with 512 queries: 10,000 keys and more x 4096 and 11008 (354 us against 399, 2519
        # against 2612, .. 60,380 against 66,820), 1,000 x 11008 (365 against 377). Not at 768, nor
        # at 1,000 x 4096 (155 against 152), nor with 64 queries anywhere.
        Shapes(2, (181, None), 2048, None, 7_000_000),
    ),
}


WARM_ENTRIES = (1, 4096, 1 << 17)
"""Codebooks of these sizes meet every row above and every row of Triton's tables of tiles."""


def triton_is_faster(
    capability: tuple[int, int], size: int, batch: int, keys: int, dim: int, sketched: bool
) -> bool:
    """Tell whether Triton answers a call sooner than the compiled library, by measurements.

    Args:
        capability: of the GPU.
        size: bytes of a key's element.
        batch, keys, dim: queries, slots (whatever the count: a captured call stays what it is) and
            their width.
        sketched: whether a sketch is given. With one the compiled library was the faster one in 11
            cases, and as fast in the twelfth.
    """
    rows = TRITON_IS_FASTER.get(capability)
    if rows is None:
        return True
    return not sketched and any((size, batch, keys, dim) in shapes for shapes in rows)
