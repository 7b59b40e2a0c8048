"""nearest, lookup and adapt_: tensors -> arguments -> one launch per 4096 queries.

In the form `apart` they are two, see forms.py.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .. import sketch_layout
from . import forms, tickets, tiles
from .apart_kernel import answer_kernels, scan_kernels
from .lookup_kernel import lookup_kernels
from .pruned_kernel import QUERY_FLOATS, pruned_kernels

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
    apart = sketch is None and forms.apart()
    if apart:
        tile = forms.scanning(capability, tile, keys.element_size())
    slices = slices_of(tile, capacity, dim, at_once, multiprocessors)
    blocks = -(-at_once // tile.queries)
    together = 1 if apart else tile.queries
    if written is not None and batch > together and _overlap(written.hidden, source):
        source = source.clone()  # one program writes while another one still reads
    with tickets.launching_on(device):
        # torch's allocator gives these out per stream, and keeps them to a graph that captures.
        bounds = torch.empty((2 * at_once + blocks) * slices, dtype=torch.float32, device=device)
        slots = torch.empty(at_once * slices, dtype=torch.int64, device=device)
        workspace = bounds, slots, tickets.take(device, blocks)
        sketching = None if sketch is None else (sketch, _room(tile, blocks * slices, device))
        groups = _groups(tile, blocks * slices, device) if apart else None
        if batch == at_once:
            answers = index, distance
            _launch(
                source, query_row, keys, radii, count, bounded, written, sketching, groups,
                answers, workspace, tile, slices,
            )  # fmt: skip
            return index, distance
        for start in range(0, batch, at_once):
            part = slice(start, start + at_once)
            try:
                _launch(
                    source[part] if query_row is None else source,
                    None if query_row is None else query_row[part],
                    keys, radii, count, bounded,
                    None if written is None else written.part(part), sketching, groups,
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
    groups: tuple[Tensor, Tensor] | None,
    answers: tuple[Tensor, Tensor],
    workspace: tuple[Tensor, Tensor, Tensor],
    tile: tiles.Tile,
    slices: int,
) -> None:
    """Answer up to 4096 queries with one launch on the current stream, two with `groups`."""
    batch, dim, size = answers[0].shape[0], keys.shape[1], keys.element_size()
    none = answers[0]  # for integers that there are not, and that nobody reads
    if written is None:
        output: tuple = (keys, 16, 1, none, none, keys, 16, 1)  # as it mostly is, and not looked at
        output_shape = (0, 0)
    else:
        hidden, first_row, last_row, values = written
        output = (hidden, *hidden.stride(), first_row, last_row, values, *values.stride())
        output_shape = hidden.shape
    layout = layout_of(source, keys, written)
    how = tiles.sketched(tile)
    asked = (
        source, source.stride(0), none if query_row is None else query_row,
        keys, keys.stride(0), radii, none if count is None else count,
    )  # fmt: skip
    what = bounded + 2 * (count is not None) + 4 * (written is not None)
    margin = tiles.error_bound(tile, dim, size, 128 if sketching is None else how.elements)
    sizes = batch, source.shape[0], output_shape[0], keys.shape[0], dim, output_shape[1]
    arguments = *asked, *answers, *workspace, *output, *sizes, what, *margin
    blocked = dict(BLOCK_B=tile.queries, BLOCK_N=tile.keys, GROUPS=tile.groups)
    options = dict(
        DIRECT=tile.direct, PRECISION=tiles.precision(size), BLOCK_D=tile.elements,
        STAGES=tile.stages, num_warps=tile.warps, enable_fp_fusion=False, **blocked,
    )  # fmt: skip
    grid = slices, -(-batch // tile.queries)
    try:
        if sketching is not None:
            sketch, room = sketching
            pruned_kernels[layout][grid](
                *arguments, *sketch, *room, sketch.head.shape[0] * sketch.head.shape[2],
                *tiles.sketch_bound(tile, dim), PAIRS=tile.pairs,
                BLOCK_E=how.elements, SCAN_N=how.slots, SCAN_STAGES=how.stages, ROOM=how.room,
                CHUNK=how.chunk, **options,
            )  # fmt: skip
        elif groups is not None:
            left = *workspace[:2], *groups
            scan_kernels[layout // 2 * 2][grid](
                *asked, *left, batch, source.shape[0], keys.shape[0], dim, what, *margin,
                maxnreg=forms.registers(machine(source.device)[0], tile, size), **options,
            )  # fmt: skip
            answer_kernels[layout][batch,](
                *asked, *answers, *left, *output, *sizes, what, slices,
                PAIRS=4, num_warps=4, enable_fp_fusion=False, **blocked,
            )  # fmt: skip
        else:
            lookup_kernels[layout][grid](*arguments, PAIRS=tile.pairs, **options)
    except Exception as error:
        raise RuntimeError(
            f"the Triton lookup did not start on {source.device} and wrote nothing: "
            f"{type(error).__name__}: {error}; backend='cuda' or backend='reference' may still work"
        ) from error


def layout_of(source: Tensor, keys: Tensor, written: _Written | None) -> int:
    """Return which of the kernels of `as_laid_out` a call is for: 0, 1 or 2."""
    if keys.shape[1] % 16 or not (_aligned(source) and _aligned(keys)):
        return 2
    if written is None:
        return 0
    hidden, _, _, values = written
    side_by_side = hidden.stride(1) == values.stride(1) == 1 and hidden.shape[1] % 16 == 0
    return 0 if side_by_side and _aligned(hidden) and _aligned(values) else 1


def _aligned(rows: Tensor) -> bool:
    """Tell whether rows start at multiples of 16 bytes and of 16 elements from each other."""
    return rows.data_ptr() % 16 == 0 and rows.stride(0) % 16 == 0


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


def _groups(tile: tiles.Tile, programs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return where each program that scans may leave what it knows of its groups of keys."""
    shape = programs, tile.groups, tile.queries
    bounds = torch.empty((2, *shape), dtype=torch.float32, device=device)
    return bounds, torch.empty(shape, dtype=torch.int32, device=device)


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
