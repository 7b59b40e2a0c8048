"""nearest, lookup and adapt_: tensors -> arguments -> one launch per 4096 queries."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import tickets, tiles
from .lookup_kernel import lookup_kernel

_MOST_QUERIES = 4096  # per launch
_MOST_SLICES = 1024


class _Written(NamedTuple):
    """What adapt_ writes to, with what and where."""

    hidden: Tensor
    first_row: Tensor
    last_row: Tensor
    values: Tensor


@lru_cache
def machine(device: torch.device) -> tuple[tuple[int, int], int]:
    """Return compute capability and number of multiprocessors; a CPU has what suits the tests."""
    if device.type == "cpu":
        return (9, 0), 2
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def slices_of(tile: tiles.Tile, capacity: int, batch: int, multiprocessors: int) -> int:
    """Return how many slices the keys are cut into. It does not depend on the rows in use."""
    blocks = -(-batch // tile.queries)
    wanted = max(1, multiprocessors * tile.resident // blocks)
    return max(1, min(wanted, -(-capacity // tile.keys), _MOST_SLICES))


def nearest(
    query: Tensor, keys: Tensor, radii: Tensor, count: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `grace_kernels.nearest`."""
    return _all(query, None, keys, radii, count, False, None)


def lookup(
    query: Tensor, keys: Tensor, radii: Tensor, count: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `grace_kernels.lookup`."""
    return _all(query, None, keys, radii, count, True, None)


def adapt_(
    hidden: Tensor,
    source: Tensor,
    query_row: Tensor,
    first_row: Tensor,
    last_row: Tensor,
    keys: Tensor,
    radii: Tensor,
    values: Tensor,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `grace_kernels.adapt_`; index arguments out of range are clamped, on any device."""
    written = _Written(hidden, _packed(first_row), _packed(last_row), values)
    return _all(source, _packed(query_row), keys, radii, count, True, written)


def _all(
    source: Tensor,
    query_row: Tensor | None,
    keys: Tensor,
    radii: Tensor,
    count: Tensor | None,
    bounded: bool,
    written: _Written | None,
) -> tuple[Tensor, Tensor]:
    device = source.device
    source, keys, radii = _packed(source), _packed(keys), _packed(radii)
    batch = source.shape[0] if query_row is None else query_row.shape[0]
    index = torch.empty(batch, dtype=torch.int64, device=device)
    distance = torch.empty(batch, dtype=torch.float32, device=device)
    if batch == 0:
        return index, distance
    tile = tiles.choose(machine(device)[0], keys.element_size(), min(batch, _MOST_QUERIES))
    if written is not None and batch > tile.queries and _overlap(written.hidden, source):
        source = source.clone()  # one block of queries writes while another one still reads
    with tickets.launching_on(device):
        if batch <= _MOST_QUERIES:
            _launch(source, query_row, keys, radii, count, bounded, written, index, distance, tile)
            return index, distance
        for start in range(0, batch, _MOST_QUERIES):
            part = slice(start, start + _MOST_QUERIES)
            _launch(
                source[part] if query_row is None else source,
                None if query_row is None else query_row[part],
                keys,
                radii,
                count,
                bounded,
                written
                and written._replace(
                    first_row=written.first_row[part], last_row=written.last_row[part]
                ),
                index[part],
                distance[part],
                tile,
            )
    return index, distance


def _launch(
    source: Tensor,
    query_row: Tensor | None,
    keys: Tensor,
    radii: Tensor,
    count: Tensor | None,
    bounded: bool,
    written: _Written | None,
    index: Tensor,
    distance: Tensor,
    tile: tiles.Tile,
) -> None:
    """Answer up to 4096 queries with one launch on the current stream."""
    device = source.device
    batch, dim = index.shape[0], keys.shape[1]
    blocks = -(-batch // tile.queries)
    slices = slices_of(tile, keys.shape[0], batch, machine(device)[1])
    # torch's allocator gives this out per stream, and keeps it to the graph that captures it.
    bounds = torch.empty((2 * batch + blocks) * slices, dtype=torch.float32, device=device)
    rows = torch.empty(batch * slices, dtype=torch.int64, device=device)
    if written is None:
        output: tuple = (None, 0, 0, None, None, None, 0, 0)
        output_shape = (0, 0)
    else:
        hidden, first_row, last_row, values = written
        output = (hidden, *hidden.stride(), first_row, last_row, values, *values.stride())
        output_shape = hidden.shape
    try:
        lookup_kernel[(slices, blocks)](
            source, source.stride(0), query_row, keys, keys.stride(0), radii, count,
            index, distance, bounds, rows, tickets.take(device, blocks), *output,
            batch, source.shape[0], output_shape[0], keys.shape[0], dim, output_shape[1],
            *tiles.error_bound(tile, dim, keys.element_size()),
            BOUNDED=bounded, DIRECT=tile.direct, PRECISION=tiles.precision(keys.element_size()),
            BLOCK_B=tile.queries, BLOCK_N=tile.keys, BLOCK_D=tile.elements, GROUPS=tile.groups,
            PAIRS=tile.pairs, STAGES=tile.stages, num_warps=tile.warps, enable_fp_fusion=False,
        )  # fmt: skip
    except Exception as error:
        raise RuntimeError(
            f"the Triton lookup did not start on {device}, and nothing was written: "
            f"{type(error).__name__}: {error}; backend='cuda' or backend='reference' may still work"
        ) from error


def _packed(tensor: Tensor) -> Tensor:
    """Return `tensor` with the elements of its last dimension side by side."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors may share memory."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
