"""Filling a new codebook from tensors, without a record per entry."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .storage import Imported, Storage

_CHUNK = 1 << 23  # elements hashed at a time


def check_shapes(
    keys: Tensor,
    values: Tensor,
    radii: Tensor,
    labels: Sequence[Sequence[int]],
    capacity: int | None,
) -> None:
    """Raise ValueError unless the arguments of `Codebook.from_tensors` belong together."""
    count = len(keys)
    if keys.ndim != 2 or values.ndim != 2 or radii.ndim != 1:
        shapes = [list(t.shape) for t in (keys, values, radii)]
        raise ValueError(f"keys, values and radii must be [N, D], [N, V] and [N], got {shapes}")
    if not len(values) == len(radii) == len(labels) == count:
        sizes = f"{count}, {len(values)}, {len(radii)} and {len(labels)}"
        raise ValueError(f"keys, values, radii and labels must agree in length, got {sizes}")
    if radii.dtype != torch.float32:
        raise ValueError(f"radii must be float32, got {radii.dtype}")
    if capacity is not None and capacity < count:
        raise ValueError(f"capacity must be at least {count}, got {capacity}")


def fill(
    storage: Storage,
    keys: Tensor,
    values: Tensor,
    radii: Tensor,
    labels: Sequence[Sequence[int]],
    *,
    adopt: bool = False,
) -> None:
    """Make row i of the tensors slot and edit i of an empty codebook; nothing is decided.

    Args:
        keys, values, radii, labels: as `check_shapes` lets pass.
        adopt: keys and values become its memory, whatever its capacity was.

    Raises:
        ValueError: a number is not finite, a label empty, or, but for the policy "paper", a radius
            negative or two keys equal.
    """
    for name, tensor in (("keys", keys), ("values", values)):
        if not _all_finite(tensor):
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    if not storage.settings.paper:
        if not (radii >= 0).all():
            worst = radii[~(radii >= 0)][0].item()
            raise ValueError(f"radii must not be negative or NaN, got {worst}")
        pair = equal_rows(keys)
        if pair is not None:
            raise ValueError(f"keys must differ from each other, got equal rows {pair}")
    ids = [tuple(label) for label in labels]
    if not all(ids):
        raise ValueError(f"labels must hold at least one id each, got none at [{ids.index(())}]")
    (storage.slots.adopt if adopt else storage.slots.fill)(keys, values, radii)
    storage.fill(Imported(ids, radii.cpu().clone()), {}, {}, {})
    storage.next_id = storage.next_value_id = len(ids)
    storage.version = 1
    storage.journal.forget("the entries were imported")
    storage.slots.maintain_sketch()


def _all_finite(rows: Tensor) -> bool:
    # A piece at a time: what torch makes for the answer is as large as what it is asked about.
    step = max(1, _CHUNK // max(1, rows.shape[1]))
    return all(bool(torch.isfinite(piece).all()) for piece in rows.split(step))


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
