"""Three small things that the parts of the storage do with tensors."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Say whether two vectors of one dtype are equal to the bit (-0 is not 0, a NaN is itself)."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def digest(query: Tensor) -> bytes:
    """Return a hash of a query's numbers; -0 and 0, between which the distance is 0, are one."""
    plain = (query.detach().cpu() + 0.0).contiguous().view(torch.uint8)
    return hashlib.blake2b(plain.numpy().tobytes(), digest_size=16).digest()


def resized(tensor: Tensor, rows: int, fill: float) -> Tensor:
    """Return a copy of `tensor` with `rows` rows, new ones filled with `fill`."""
    with torch.inference_mode(False):  # or nobody could write to it outside of that mode
        out = tensor.new_full((rows, *tensor.shape[1:]), fill)
        kept = min(rows, len(tensor))
        out[:kept] = tensor[:kept]
    return out
