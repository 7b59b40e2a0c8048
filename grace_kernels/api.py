"""The public functions: contract, checks, autograd gate, operator.

A codebook is three tensors on one device: `keys [C, D]`, `values [C, V]` and `radii [C]`. Its
distance is the Euclidean one, defined to the bit in `grace_kernels.reference`, so that every
implementation, batch size, position in the batch and thread count gives the same answer.

The method is that of Hartvigsen et al., "Aging with GRACE" (NeurIPS 2023, arXiv 2211.11031).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import autograd
from .backends import Backend, select
from .choice import WARM_ENTRIES
from .sketch import Sketch, check_sketch
from .torch_private import forward_mode
from .validation import check_adapt, check_codebook, check_written


def nearest(
    query: Tensor,
    keys: Tensor,
    radii: Tensor,
    count: Tensor | int | None = None,
    *,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the nearest live entry of each query, whatever its radius.

    Args:
        query: `[B, D]`, float32, float16 or bfloat16. Rows may have any stride; where the last
            dimension of this or of `keys` is strided, a copy is made.
        keys: `[C, D]`, the dtype of `query`.
        radii: `[C]` float32. -inf marks a dead entry, which is never the nearest. A NaN or a finite
            negative radius is live.
        count: the number of rows in use: an int64 scalar tensor on the device of `query`, an int,
            or None for C. What later rows hold never matters, NaN included.
        backend: an implementation by name, or None for the best there is.

    Returns:
        index: `[B]` int64, the slot of the smallest distance, among exact ties the lowest; -1 where
            there is no live entry or the query holds a NaN.
        distance: `[B]` float32, 0 for a query equal to its key; +inf where index is -1 and where
            the squared distance overflows or is NaN.
        Deterministic to the bit. Not differentiable.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: a rank, shape, dtype or device is wrong, or `count` lies outside `[0, C]`.
        BackendUnavailable: `backend` cannot answer here.
    """
    check_codebook("query", query, keys, radii, count)
    op = select("nearest", backend, keys, query.shape[0])
    keys, radii, rows = _in_use(keys, radii, count)
    index, distance = op(_plain(query), _plain(keys), _plain(radii), rows)
    return index, distance


def lookup(
    query: Tensor,
    keys: Tensor,
    radii: Tensor,
    count: Tensor | int | None = None,
    *,
    sketch: Sketch | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the entry that answers each query: its nearest, if that entry's radius covers it.

    The nearest live entry decides. A query inside a farther entry's ball is a miss when its nearest
    entry does not cover it, so a negative radius blocks and never answers.

    Args:
        query, keys, radii, count, backend: as for `nearest`. A radius of +inf covers everything, a
            NaN radius nothing.
        sketch: of these keys and radii, told of every change to them, or None. It changes how many
            keys are read, never an answer.

    Returns:
        index: `[B]` int64, the slot that answers (distance <= radius), -1 for a miss.
        distance: `[B]` float32, +inf for a miss.
        Deterministic to the bit. Not differentiable.

    Raises:
        TypeError, BackendUnavailable: as `nearest`.
        ValueError: as `nearest`, or `sketch` was made for another width, dtype or device.
    """
    check_codebook("query", query, keys, radii, count)
    tensors = check_sketch(sketch, keys)
    op = select("pruned_lookup" if tensors else "lookup", backend, keys, query.shape[0])
    keys, radii, rows = _in_use(keys, radii, count)
    index, distance = op(_plain(query), _plain(keys), _plain(radii), rows, *tensors)
    return index, distance


def adapt_(
    hidden: Tensor,
    source: Tensor,
    query_row: Tensor,
    first_row: Tensor,
    last_row: Tensor,
    keys: Tensor,
    radii: Tensor,
    values: Tensor,
    count: Tensor | int | None = None,
    *,
    sketch: Sketch | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Replace rows of a layer's output, in place, where an entry answers the layer's input.

    Sequence b asks with `source[query_row[b]]`; on a hit the entry's value is written into
    `hidden[first_row[b]:last_row[b]]`. Misses write nothing. Rows are numbered through, so one call
    serves `[B * T, ...]` views of padded batches and packed batches alike.

    Args:
        hidden: `[R, V]`, written to; float32, float16, bfloat16 or float64, any strides for which
            no two elements share memory. It may be `source`, but must not share the memory that
            `values` spans.
        source: `[S, D]`, the rows that ask; float32, float16 or bfloat16.
        query_row: `[B]` int64, less than S; negative: sequence b does not ask, its index is -1, and
            its first and last row are not read.
        first_row, last_row: `[B]` int64, 0 <= first <= last <= R. Where the ranges of two hits
            overlap, the later sequence's value stands on a CPU; on a GPU each element holds one of
            the two.
        keys, radii, count, sketch, backend: as for `lookup`, `keys` in the dtype of `source`.
        values: `[C, V]`, the dtype of `hidden`.

    Returns:
        index, distance: `[B]`, as `lookup`.

    Raises:
        TypeError, BackendUnavailable: as `nearest`.
        ValueError: as `lookup`, or, on a CPU, an index argument lies outside its range. Nothing
            has been written then. Other devices clamp instead: a query_row of S or more is a miss.
        RuntimeError: a gradient is wanted for `hidden` or `values`; call `adapt`.
    """
    check_adapt(hidden, source, query_row, first_row, last_row, keys, radii, values, count)
    check_written(hidden, values)
    if torch.is_grad_enabled() and (hidden.requires_grad or values.requires_grad):
        name = "hidden" if hidden.requires_grad else "values"
        raise RuntimeError(
            f"{name} must not require a gradient in adapt_, got requires_grad=True; "
            "call adapt, or call adapt_ under torch.no_grad()"
        )
    tensors = check_sketch(sketch, keys)
    op = select("pruned_adapt_" if tensors else "adapt_", backend, keys, query_row.shape[0])
    keys, radii, rows = _in_use(keys, radii, count)
    index, distance = op(
        hidden,
        _plain(source),
        query_row,
        first_row,
        last_row,
        _plain(keys),
        _plain(radii),
        values,
        rows,
        *tensors,
    )
    # Not left to the operators: the stable interface writes without autograd's knowledge, and a
    # backward that saved `hidden` would then compute with what was written.
    increment_version(hidden)
    return index, distance


def adapt(
    hidden: Tensor,
    source: Tensor,
    query_row: Tensor,
    first_row: Tensor,
    last_row: Tensor,
    keys: Tensor,
    radii: Tensor,
    values: Tensor,
    count: Tensor | int | None = None,
    *,
    sketch: Sketch | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `adapt_` does on a copy of `hidden`, differentiably in `hidden` and `values`.

    The gradient of a replaced row goes to the value that replaced it (summed over the rows in
    ascending order, in float32 or wider) and is zero for `hidden`. `source`, `keys` and `radii` get
    none. Where ranges overlap, the later sequence's value gets it, though on a GPU the other may
    stand. There are no second derivatives, no forward mode and no batching rule: of torch.func,
    grad, vjp and jacrev work; jvp and vmap raise.

    Args:
        As for `adapt_`; `hidden` is left as it is and may have any strides and share any memory.

    Returns:
        hidden: `[R, V]`, contiguous.
        index, distance: `[B]`, as `lookup`; not differentiable.

    Raises:
        TypeError, ValueError, BackendUnavailable: as `adapt_`.
    """
    check_adapt(hidden, source, query_row, first_row, last_row, keys, radii, values, count)
    tensors = check_sketch(sketch, keys)
    op = select("pruned_adapt_" if tensors else "adapt_", backend, keys, query_row.shape[0])
    keys, radii, rows = _in_use(keys, radii, count)
    source, keys, radii = _plain(source), _plain(keys), _plain(radii)
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or values.requires_grad)
    # In forward mode requires_grad tells nothing; the function refuses where a tangent is carried.
    if wanted or forward_mode():
        out, index, distance = autograd.Adapt.apply(
            op, hidden, source, query_row, first_row, last_row, keys, radii, values, rows, *tensors
        )
        return out, index, distance
    out = hidden.clone(memory_format=torch.contiguous_format)
    index, distance = op(
        out, source, query_row, first_row, last_row, keys, radii, values, rows, *tensors
    )
    return out, index, distance


def warmup(
    dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: torch.device | str | int,
    batch_sizes: Iterable[int] = (1,),
    *,
    value_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> None:
    """Compile and load what a server will need, so that no request pays for it.

    Calls `nearest`, `lookup` and `adapt_` once for every batch size on dead entries and waits for
    the device, with `count` given and not: on one entry, and on a GPU on as many as there must be
    for another kernel to answer. Kernels are compiled per dtype, row of the table of tiles, and
    whether strides and addresses of queries, keys, values and outputs are multiples of 16 (taken to
    be so here where the widths are), never per number of entries; what triton has compiled it keeps
    on disk. A call that is captured into a CUDA graph needs a warm device.

    Args:
        dim: D, the width of keys and queries.
        value_dim: V, the width of values.
        dtype: of keys and queries, float32, float16 or bfloat16.
        device: where the codebook lives.
        batch_sizes: how many sequences will ask at a time.
        value_dtype: of values, if it differs from `dtype`.
        backend: an implementation by name, or None for the one that will be chosen.

    Raises:
        ValueError: a size is negative or a dtype is not supported.
        BackendUnavailable: `backend` cannot answer there.
    """
    for name, size in (("dim", dim), ("value_dim", value_dim)):
        if size < 0:
            raise ValueError(f"{name} must not be negative, got {size}")
    device = torch.device(device)
    count = torch.ones((), dtype=torch.int64, device=device)
    for batch in batch_sizes:
        if batch < 0:
            raise ValueError(f"batch_sizes must not be negative, got {batch}")
        source = torch.zeros(batch, dim, dtype=dtype, device=device)
        hidden = torch.zeros(batch, value_dim, dtype=value_dtype or dtype, device=device)
        row = torch.arange(batch, device=device)
        for entries in WARM_ENTRIES if device.type == "cuda" else WARM_ENTRIES[:1]:
            keys, values = _alike(entries, source), _alike(entries, hidden)
            radii = torch.full((entries,), -torch.inf, device=device)
            for rows in (None, count):
                nearest(source, keys, radii, rows, backend=backend)
                lookup(source, keys, radii, rows, backend=backend)
                adapt_(hidden, source, row, row, row, keys, radii, values, rows, backend=backend)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _alike(entries: int, rows: Tensor) -> Tensor:
    """Return so many rows of zeros as wide as `rows`, that share most of their memory.

    They lie at multiples of 16 elements only if rows side by side do.
    """
    width = rows.shape[1]
    step = 16 if width % 16 == 0 else 17
    return rows.new_zeros(entries * step + width).as_strided((entries, width), (step, 1))


def _in_use(
    keys: Tensor, radii: Tensor, count: Tensor | int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return keys, radii and the count the operators take: an int count is a slice."""
    if count is None or isinstance(count, Tensor):
        return keys, radii, count
    return keys[:count], radii[:count], None


def _plain(tensor: Tensor) -> Tensor:
    """Return `tensor` without its gradient, for arguments that are not differentiable."""
    return tensor.detach() if tensor.requires_grad else tensor
