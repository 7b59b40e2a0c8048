"""Argument checks, once, in Python: type, rank, shape, dtype, device.

Every message reads "<argument> must <rule>, got <value>". Values of index tensors are checked by
the operators themselves, which may read them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .torch_private import share_storage

KEY_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
VALUE_DTYPES = (*KEY_DTYPES, torch.float64)


def _tensor(name: str, tensor: object, rank: int) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.dim() != rank:
        raise ValueError(f"{name} must have rank {rank}, got shape {list(tensor.shape)}")


def _dtype(name: str, tensor: Tensor, rule: str, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} must {rule}, got {tensor.dtype}")


def _device(name: str, tensor: Tensor, other: str, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on the device of {other} ({device}), got {tensor.device}")


def check_codebook(
    name: str, query: Tensor, keys: Tensor, radii: Tensor, count: Tensor | int | None
) -> None:
    """Raise unless `query` (called `name`), `keys`, `radii` and `count` fit together.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: a rank, shape, dtype, device or the value of an int `count` is wrong.
    """
    _tensor(name, query, 2)
    _tensor("keys", keys, 2)
    _tensor("radii", radii, 1)
    capacity = keys.shape[0]
    if keys.shape[1] != query.shape[1]:
        raise ValueError(
            f"keys must have {query.shape[1]} columns like {name}, got shape {list(keys.shape)}"
        )
    if radii.shape[0] != capacity:
        raise ValueError(f"radii must have {capacity} rows like keys, got {radii.shape[0]}")
    _dtype(name, query, "be float32, float16 or bfloat16", KEY_DTYPES)
    _dtype("keys", keys, f"have the dtype of {name} ({query.dtype})", (query.dtype,))
    _dtype("radii", radii, "be float32", (torch.float32,))
    _device("keys", keys, name, query.device)
    _device("radii", radii, name, query.device)
    if count is None:
        return
    if isinstance(count, Tensor):
        _tensor("count", count, 0)
        _dtype("count", count, "be int64", (torch.int64,))
        _device("count", count, name, query.device)
    elif isinstance(count, bool) or not isinstance(count, (int, torch.SymInt)):
        raise TypeError(f"count must be a Tensor, an int or None, got {type(count).__name__}")
    elif not 0 <= count <= capacity:
        raise ValueError(f"count must lie in [0, {capacity}], got {count}")


def check_adapt(
    hidden: Tensor,
    source: Tensor,
    query_row: Tensor,
    first_row: Tensor,
    last_row: Tensor,
    keys: Tensor,
    radii: Tensor,
    values: Tensor,
    count: Tensor | int | None,
) -> None:
    """Raise unless the arguments of `adapt` and `adapt_` fit together.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: a rank, shape, dtype, device or the value of an int `count` is wrong.
    """
    check_codebook("source", source, keys, radii, count)
    _tensor("hidden", hidden, 2)
    _tensor("values", values, 2)
    if values.shape[0] != keys.shape[0]:
        raise ValueError(f"values must have {keys.shape[0]} rows like keys, got {values.shape[0]}")
    if values.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"values must have {hidden.shape[1]} columns like hidden, "
            f"got shape {list(values.shape)}"
        )
    _dtype("hidden", hidden, "be float32, float16, bfloat16 or float64", VALUE_DTYPES)
    _dtype("values", values, f"have the dtype of hidden ({hidden.dtype})", (hidden.dtype,))
    _device("hidden", hidden, "source", source.device)
    _device("values", values, "source", source.device)
    for name, rows in (("query_row", query_row), ("first_row", first_row), ("last_row", last_row)):
        _tensor(name, rows, 1)
        if rows.shape[0] != query_row.shape[0]:
            raise ValueError(
                f"{name} must have {query_row.shape[0]} elements like query_row, "
                f"got {rows.shape[0]}"
            )
        _dtype(name, rows, "be int64", (torch.int64,))
        _device(name, rows, "source", source.device)


def check_written(hidden: Tensor, values: Tensor) -> None:
    """Raise unless rows of `values` can be written into `hidden` one by one.

    Not while tracing: graphs are functional, and what is copied back is checked by torch.

    Raises:
        ValueError: two elements of `hidden` share memory, or it shares memory with `values`.
    """
    if torch.compiler.is_compiling():
        return
    if not hidden.is_contiguous() and _overlaps_itself(hidden):
        raise ValueError(
            "hidden must not hold two elements in one place of memory, "
            f"got shape {list(hidden.shape)} with strides {list(hidden.stride())}"
        )
    if not share_storage(hidden, values):
        return
    (first, end), (values_first, values_end) = _span(hidden), _span(values)
    if first < values_end and values_first < end:
        raise ValueError(
            "hidden must not share memory with values, got elements "
            f"{first}..{end - 1} and {values_first}..{values_end - 1} of one storage"
        )


def _overlaps_itself(matrix: Tensor) -> bool:
    """Return whether two elements lie at one address: i * stride[0] == j * stride[1]."""
    (rows, columns), (row, column) = matrix.shape, matrix.stride()
    step = math.gcd(row, column) or 1
    return rows * columns > 1 and column // step < rows and row // step < columns


def _span(matrix: Tensor) -> tuple[int, int]:
    """Return the first element's place in the storage and the one after the last element's."""
    first = matrix.storage_offset()
    if matrix.numel() == 0:
        return first, first
    reach = sum((n - 1) * step for n, step in zip(matrix.shape, matrix.stride(), strict=True))
    return first, first + reach + 1
