"""Filling a new codebook from tensors, without a record per row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import sketch_upkeep as sketching
from .policy import PAPER

if TYPE_CHECKING:
    from .codebook import Codebook

_CHUNK = 1 << 23  # elements hashed at a time


def fill(
    book: Codebook, keys: Tensor, values: Tensor, radii: Tensor, labels: Sequence[Sequence[int]]
) -> None:
    """Make row i of the tensors entry and edit i of an empty codebook; nothing is decided."""
    count = len(keys)
    for name, tensor in (("keys", keys), ("values", values)):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    if book.policy != PAPER:
        if not (radii >= 0).all():
            worst = radii[~(radii >= 0)][0].item()
            raise ValueError(f"radii must not be negative or NaN, got {worst}")
        pair = equal_rows(keys)
        if pair is not None:
            raise ValueError(f"keys must differ from each other, got equal rows {pair}")
    ids = [tuple(label) for label in labels]
    if not all(ids):
        raise ValueError(f"labels must hold at least one id each, got none at [{ids.index(())}]")
    book.keys[:count] = keys
    book.values[:count] = values
    book.radii[:count] = radii
    book._imported_radii = radii.detach().cpu().clone()
    book._imported_labels = ids
    if count:
        numbers = [book._label_number(label) for label in ids]
        book._label_ids[:count] = torch.tensor(numbers, device=book.device)
    book._row_count = book._live_edits = book._next_id = book._next_stamp = count
    book.count.fill_(count)
    book.version = 1
    book._undo_end = "the rows were imported"
    sketching.settle(book)


def equal_rows(keys: Tensor) -> tuple[int, int] | None:
    """Return two rows of `[N, D]` that are equal, 0 and -0 being the same, or None."""
    codes = []
    weights = None
    step = max(1, _CHUNK // keys.shape[1])
    for start in range(0, len(keys), step):
        piece = keys[start : start + step]
        bits = (piece + 0.0).contiguous()
        numbers = bits.view(torch.int32 if piece.element_size() == 4 else torch.int16).long()
        if weights is None:
            source = torch.Generator().manual_seed(0)
            weights = torch.randint(-(2**62), 2**62, (keys.shape[1],), generator=source) * 2 + 1
            weights = weights.to(keys.device)
        codes.append((numbers * weights).sum(1))  # wraps around: exact, and the same in any order
    if not codes:
        return None
    code, order = torch.cat(codes).sort(stable=True)
    for at in (code[1:] == code[:-1]).nonzero()[:, 0].tolist():
        first, second = int(order[at]), int(order[at + 1])
        if torch.equal(keys[first], keys[second]):
            return first, second
    return None
