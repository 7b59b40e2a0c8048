"""A plugin of pytest: matrix products round as they might on another machine.

    ROUNDING=2 python -m pytest -p tests.other_rounding tests/edit

The sums of a product are made of two parts, and where they part depends on the product's shape, on
the row (those that fill blocks of a few rows, and the rest) and on ROUNDING, as the order of sums
does in BLAS libraries. An odd ROUNDING has attention taken by such products too. The same product
of the same shape gives the same bits again. What fails with this and not without it assumes more
of a machine than it may.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

SEED = int(os.environ.get("ROUNDING", "1"))
BLOCK = 4 + SEED % 3  # rows
HALVES = (torch.float16, torch.bfloat16)
NAMES = ("mm", "bmm", "addmm", "baddbmm")

kernels = {name: torch.library.get_kernel(f"aten::{name}", "CPU") for name in NAMES}
library = torch.library.Library("aten", "IMPL")


def product(keys: Any, a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b` of matrices or of batches of them."""
    kernel = kernels["mm" if a.dim() == 2 else "bmm"]
    if not (a.is_floating_point() and a.numel() and b.numel()):
        return kernel.call_boxed(keys, a, b)
    if a.dtype in HALVES:
        return product(keys, a.float(), b.float()).to(a.dtype)
    rows, inner = a.shape[-2:]
    full = rows // BLOCK * BLOCK
    parts = []
    for some in (slice(0, full), slice(full, rows)):
        x = a[..., some, :]
        if x.numel():
            at = (rows * 7919 + inner * 31 + full - some.start + SEED * 613) % inner
            left = kernel.call_boxed(keys, x[..., :at], b[..., :at, :])
            parts.append(left + kernel.call_boxed(keys, x[..., at:], b[..., at:, :]))
    return torch.cat(parts, dim=-2)


def sum_of(keys: Any, c: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    """Return `beta c + alpha a @ b`."""
    if a.dtype in HALVES:
        wide = sum_of(keys, c.float(), a.float(), b.float(), beta=beta, alpha=alpha)
        return wide.to(a.dtype)
    made = product(keys, a, b) if alpha == 1 else product(keys, a, b) * alpha
    return made if beta == 0 else made + (c if beta == 1 else c * beta)


torch.backends.cuda.enable_flash_sdp(SEED % 2 == 0)  # of CPUs as well
for name, function in zip(NAMES, (product, product, sum_of, sum_of), strict=True):
    library.impl(name, function, "CPU", with_keyset=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what compares with another process, which rounds as usual."""
    items[:] = [item for item in items if "fresh_process" not in item.name]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say that it worked."""
    one, other = torch.full((9, 99), 0.1), torch.full((99, 1), 0.1)
    values = (one @ other).unique().tolist()
    terminalreporter.write_line(f"a product's rows, all equal but for rounding: {values}")
