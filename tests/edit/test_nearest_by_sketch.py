"""The nearest entry of one query, for decisions: by the sketch, with the bits of a scan."""

from __future__ import annotations

import math

import pytest
import torch
from grace_edit import Codebook
from grace_edit.codebook import slots

import grace_kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.0, 4.0], ids=["no structure", "clusters"])
def test_it_is_what_a_scan_finds(
    dtype: torch.dtype, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(8)
    count, dim = 6000, 32
    centres = torch.randn(8, dim, generator=generator) * spread
    rows = torch.randn(count, dim, generator=generator) + centres[torch.arange(count) % 8]
    keys = rows.to(dtype)
    radii = torch.rand(count, generator=generator)
    radii[3] = math.inf
    labels = [(n,) for n in range(count)]
    book = Codebook.from_tensors(keys, torch.zeros(count, 2), radii, labels)
    book.delete(70)
    held = book.storage.slots
    scans = []

    def noted(query: torch.Tensor, keys: torch.Tensor, radii: torch.Tensor) -> object:
        scans.append(len(keys))
        return grace_kernels.nearest(query, keys, radii)

    monkeypatch.setattr(slots, "nearest", noted)
    counted = book.sketch.counts()
    asked = [
        *keys[[0, 70, 71, 5999]],
        *(keys[:6].float() + 0.3 * torch.randn(6, dim, generator=generator)).to(dtype),
        *torch.randn(6, dim, generator=generator).to(dtype),
        torch.full((dim,), 100.0, dtype=dtype),
    ]
    other = held.radii[: held.in_use].clone()
    other[:3000] = -math.inf
    for query in asked:
        for of in (None, other):
            wanted = grace_kernels.nearest(
                query[None],
                held.keys[: held.in_use],
                held.radii[: held.in_use] if of is None else of,
            )
            assert held.nearest(query, of) == (int(wanted[0]), wanted[1].item())
    assert max(scans) < count
    assert book.sketch.counts() == counted


def test_without_a_bound_all_keys_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = torch.randn(5000, 8, generator=torch.Generator().manual_seed(1))
    book = Codebook.from_tensors(keys, torch.zeros(5000, 1), torch.ones(5000), [(0,)] * 5000)
    held = book.storage.slots
    nan = torch.full((8,), math.nan)
    assert held.nearest(nan) == (-1, math.inf)
    alone = torch.full((5000,), -math.inf)
    alone[1] = 1.0  # not in the sample, which is every second one
    assert held.nearest(keys[9], alone)[0] == 1
    assert held.nearest(keys[9], torch.full((5000,), -math.inf)) == (-1, math.inf)
