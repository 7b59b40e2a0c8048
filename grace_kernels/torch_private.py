"""What this package takes from torch's private names, all of it."""

from __future__ import annotations

from torch import Tensor
from torch.autograd import forward_ad


def forward_mode() -> bool:
    """Tell whether tensors may carry tangents, which `requires_grad` does not show."""
    return forward_ad._current_level >= 0  # noqa: SLF001 (nothing public asks without a tensor)


def share_storage(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors are views of one piece of memory, at whatever addresses."""
    # Addresses would not do: storages without data, as of fake tensors, are all at 0.
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata  # noqa: SLF001
