"""nearest, lookup and adapt_: tensors -> arguments -> one launch per 4096 queries."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .. import sketch_layout
from . import tickets, tiles
from .lookup_kernel import lookup_kernel
from .pruned_kernel import QUERY_FLOATS, pruned_kernel

_MOST_QUERIES = 4096  # per launch
_MOST_SLICES = 1024
_MOST_COUNTED = 1 << 30  # slots and steps of a slice


class _Sketch(NamedTuple):
    """The tensors of a `grace_kernels.Sketch`, in the operators' order."""

    centre: Tensor
    directions: Tensor
    scales: Tensor
    head: Tensor
    tail: Tensor
    covered: Tensor
    radius_bound: Tensor
    outliers: Tensor
    counters: Tensor


class _Written(NamedTuple):
    """What adapt_ writes to, with what and where."""

    hidden: Tensor
    first_row: Tensor
    last_row: Tensor
    values: Tensor

    def part(self, queries: slice) -> _Written:
        """Return what some of the queries write."""
        return self._replace(first_row=self.first_row[queries], last_row=self.last_row[queries])


@lru_cache
def machine(device: torch.device) -> tuple[tuple[int, int], int]:
    """Return compute capability and number of multiprocessors; a CPU has what suits the tests."""
    if device.type == "cpu":
        return (9, 0), 2
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def slices_of(tile: tiles.Tile, capacity: int, dim: int, batch: int, multiprocessors: int) -> int:
    """Return how many slices the keys are cut into. It does not depend on the slots in use."""
    blocks = -(-batch // tile.queries)
    wanted = max(1, multiprocessors * tile.resident // blocks)
    wanted = min(wanted, -(-capacity // tile.keys), _MOST_SLICES)
    steps = -(-capacity // tile.keys) * -(-dim // tile.elements)  # in all; 32 bits count a slice's
    return max(1, wanted, -(-capacity // _MOST_COUNTED), -(-steps // _MOST_COUNTED))


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


def pruned_lookup(
    query: Tensor, keys: Tensor, radii: Tensor, count: Tensor | None, *sketch: Tensor
) -> tuple[Tensor, Tensor]:
    """Do what `lookup` does, with the tensors of a sketch."""
    return _all(query, None, keys, radii, count, True, None, _Sketch(*sketch))


def pruned_adapt_(
    hidden: Tensor,
    source: Tensor,
    query_row: Tensor,
    first_row: Tensor,
    last_row: Tensor,
    keys: Tensor,
    radii: Tensor,
    values: Tensor,
    count: Tensor | None,
    *sketch: Tensor,
) -> tuple[Tensor, Tensor]:
    """Do what `adapt_` does, with the tensors of a sketch."""
    written = _Written(hidden, _packed(first_row), _packed(last_row), values)
    return _all(source, _packed(query_row), keys, radii, count, True, written, _Sketch(*sketch))


def _all(
    source: Tensor,
    query_row: Tensor | None,
    keys: Tensor,
    radii: Tensor,
    count: Tensor | None,
    bounded: bool,
    written: _Written | None,
    sketch: _Sketch | None = None,
) -> tuple[Tensor, Tensor]:
    _check(source, query_row, keys, radii, count, written)
    if sketch is not None:
        _check_sketch(sketch, keys)
    device = source.device
    source, keys, radii = _packed(source), _packed(keys), _packed(radii)
    batch = source.shape[0] if query_row is None else query_row.shape[0]
    index = torch.empty(batch, dtype=torch.int64, device=device)
    distance = torch.empty(batch, dtype=torch.float32, device=device)
    if batch == 0:
        return index, distance
    at_once = min(batch, _MOST_QUERIES)
    capability, multiprocessors = machine(device)
    (capacity, dim), compared = keys.shape, 0 if sketch is not None else keys.shape[0]
    tile = tiles.choose(capability, keys.element_size(), at_once, compared, dim)
    slices = slices_of(tile, capacity, dim, at_once, multiprocessors)
    blocks = -(-at_once // tile.queries)
    if written is not None and batch > tile.queries and _overlap(written.hidden, source):
        source = source.clone()  # one block of queries writes while another one still reads
    with tickets.launching_on(device):
        # torch's allocator gives these out per stream, and keeps them to a graph that captures.
        bounds = torch.empty((2 * at_once + blocks) * slices, dtype=torch.float32, device=device)
        slots = torch.empty(at_once * slices, dtype=torch.int64, device=device)
        workspace = bounds, slots, tickets.take(device, blocks)
        sketching = None if sketch is None else (sketch, _room(tile, blocks * slices, device))
        if batch == at_once:
            answers = index, distance
            _launch(
                source, query_row, keys, radii, count, bounded, written, sketching, answers,
                workspace, tile, slices,
            )  # fmt: skip
            return index, distance
        for start in range(0, batch, at_once):
            part = slice(start, start + at_once)
            try:
                _launch(
                    source[part] if query_row is None else source,
                    None if query_row is None else query_row[part],
                    keys, radii, count, bounded,
                    None if written is None else written.part(part), sketching,
                    (index[part], distance[part]), workspace, tile, slices,
                )  # fmt: skip
            except RuntimeError as error:
                if start == 0:
                    raise
                raise RuntimeError(
                    f"the first {start} queries were answered; then {error}"
                ) from error
    return index, distance


def _launch(
    source: Tensor,
    query_row: Tensor | None,
    keys: Tensor,
    radii: Tensor,
    count: Tensor | None,
    bounded: bool,
    written: _Written | None,
    sketching: tuple[_Sketch, tuple[Tensor, Tensor]] | None,
    answers: tuple[Tensor, Tensor],
    workspace: tuple[Tensor, Tensor, Tensor],
    tile: tiles.Tile,
    slices: int,
) -> None:
    """Answer up to 4096 queries with one launch on the current stream."""
    batch, dim, size = answers[0].shape[0], keys.shape[1], keys.element_size()
    if written is None:
        output: tuple = (None, 0, 0, None, None, None, 0, 0)
        output_shape = (0, 0)
    else:
        hidden, first_row, last_row, values = written
        output = (hidden, *hidden.stride(), first_row, last_row, values, *values.stride())
        output_shape = hidden.shape
    how = tiles.sketched(tile)
    arguments = (
        source, source.stride(0), query_row, keys, keys.stride(0), radii, count,
        *answers, *workspace, *output,
        batch, source.shape[0], output_shape[0], keys.shape[0], dim, output_shape[1],
        *tiles.error_bound(tile, dim, size, 128 if sketching is None else how.elements),
    )  # fmt: skip
    options = dict(
        DIRECT=tile.direct, PRECISION=tiles.precision(size),
        BLOCK_B=tile.queries, BLOCK_N=tile.keys, BLOCK_D=tile.elements, GROUPS=tile.groups,
        PAIRS=tile.pairs, STAGES=tile.stages, num_warps=tile.warps, enable_fp_fusion=False,
    )  # fmt: skip
    grid = slices, -(-batch // tile.queries)
    try:
        if sketching is None:
            lookup_kernel[grid](*arguments, BOUNDED=bounded, **options)
        else:
            sketch, room = sketching
            pruned_kernel[grid](
                *arguments, *sketch, *room, sketch.head.shape[0] * sketch.head.shape[2],
                *tiles.sketch_bound(tile, dim),
                BLOCK_E=how.elements, SCAN_N=how.slots, SCAN_STAGES=how.stages, ROOM=how.room,
                CHUNK=how.chunk, **options,
            )  # fmt: skip
    except Exception as error:
        raise RuntimeError(
            f"the Triton lookup did not start on {source.device} and wrote nothing: "
            f"{type(error).__name__}: {error}; backend='cuda' or backend='reference' may still work"
        ) from error


def _check(
    source: Tensor,
    query_row: Tensor | None,
    keys: Tensor,
    radii: Tensor,
    count: Tensor | None,
    written: _Written | None,
) -> None:
    """Refuse what would be read or written out of bounds; api.py says more about it."""
    capacity = keys.shape[0]
    if not source.dim() == keys.dim() == 2 or radii.shape != (capacity,):
        raise ValueError("query and keys must have rank 2 and radii a number per key")
    if source.shape[1] != keys.shape[1] or source.dtype != keys.dtype:
        raise ValueError("query and keys must have one width and dtype")
    if radii.dtype != torch.float32:
        raise ValueError(f"radii must be float32, got {radii.dtype}")
    numbers = [query_row, count]
    others = [keys, radii]
    if written is not None:
        hidden, first_row, last_row, values = written
        if hidden.dim() != 2 or values.shape[1:] != hidden.shape[1:] or len(values) < capacity:
            raise ValueError("hidden and values must have one width, and values a row per key")
        if hidden.dtype != values.dtype:
            raise ValueError("hidden and values must have one dtype")
        if not first_row.shape == last_row.shape == query_row.shape:  # type: ignore[union-attr]
            raise ValueError("query_row, first_row and last_row must have one length")
        numbers += [first_row, last_row]
        others += [hidden, values]
    integers = [tensor for tensor in numbers if tensor is not None]
    if any(tensor.dtype != torch.int64 for tensor in integers):
        raise ValueError("query_row, first_row, last_row and count must be int64")
    if any(tensor.device != source.device for tensor in (*others, *integers)):
        raise ValueError(
            f"all arguments must be on one device, that of the queries {source.device}"
        )


def _room(tile: tiles.Tile, programs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return each program's workspace: its queries' sketches and its list of survivors."""
    floats = (programs, tile.queries, QUERY_FLOATS)
    scratch = torch.empty(floats, dtype=torch.float32, device=device)
    room = tiles.sketched(tile).room
    return scratch, torch.empty((programs, room), dtype=torch.int32, device=device)


def _check_sketch(sketch: _Sketch, keys: Tensor) -> None:
    """Refuse what would be read or written out of bounds; `check_sketch` says more about it."""
    wanted = sketch_layout.layout(keys.shape[1], len(sketch.head))
    for (name, (shape, dtype)), tensor in zip(wanted.items(), sketch, strict=True):
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be {dtype} {list(shape)} without gaps, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
        if tensor.device != keys.device:
            raise ValueError(f"{name} must be on {keys.device} like keys, got {tensor.device}")


def _packed(tensor: Tensor) -> Tensor:
    """Return `tensor` with the elements of its last dimension side by side."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Tell whether the memory that two tensors span meets."""
    if a.numel() == 0 or b.numel() == 0:
        return False
    (a_first, a_end), (b_first, b_end) = _span(a), _span(b)
    return a_first < b_end and b_first < a_end


def _span(matrix: Tensor) -> tuple[int, int]:
    """Return the addresses of the first byte and of the one after the last."""
    reach = sum((n - 1) * step for n, step in zip(matrix.shape, matrix.stride(), strict=True))
    first = matrix.data_ptr()
    return first, first + (reach + 1) * matrix.element_size()
