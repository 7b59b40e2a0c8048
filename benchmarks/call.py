"""Part call: what a call costs on the host, before any work: empty and tiny codebooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import grace_kernels
from grace_kernels import Sketch

from .measurements import Measurement, Progress, Settings
from .timing import interleaved

WIDTH = 768
SIZES = (0, 8)


def run(settings: Settings, progress: Progress) -> list[Measurement]:
    """Measure one query among no keys and among eight, in float32."""
    found = []
    for done, n in enumerate(SIZES, 1):
        generator = torch.Generator().manual_seed(n)
        keys, query = (torch.randn(rows, WIDTH, generator=generator) for rows in (n, 1))
        radii, hidden, row = torch.ones(n), torch.zeros(1, WIDTH), torch.zeros(1, dtype=torch.int64)
        count = torch.tensor(n)
        right = grace_kernels.nearest(query, keys, radii, backend="reference")
        ours: dict[str, Callable[[], Any]] = {
            "nearest": lambda q=query, k=keys, r=radii: grace_kernels.nearest(q, k, r),
            "lookup": lambda q=query, k=keys, r=radii: grace_kernels.lookup(q, k, r),
            "adapt_": lambda q=query, k=keys, r=radii, h=hidden, z=row, c=count: (
                grace_kernels.adapt_(h, q, z, z, z, k, r, k, c)
            ),
            "operator grace::lookup": lambda q=query, k=keys, r=radii, c=count: (
                torch.ops.grace.lookup.default(q, k, r, c)
            ),
        }
        if n:
            sketch = Sketch.fit(keys, radii)
            ours["lookup, sketch"] = lambda q=query, k=keys, r=radii, s=sketch: (
                grace_kernels.lookup(q, k, r, sketch=s)
            )
        peers: dict[str, Callable[[], Any]] = {
            "torch.cdist": lambda q=query, k=keys: torch.cdist(k, q),
            "torch.add": lambda q=query: torch.add(q, q),
        }
        if n:
            peers["torch.cdist, min"] = lambda q=query, k=keys: torch.cdist(k, q).min(dim=0)
        if ours["nearest"]()[0].tolist() != right[0].tolist():
            raise RuntimeError("nearest gives a wrong index; nothing was measured")
        times = interleaved({**ours, **peers}, 2 * settings.budget, most=settings.pick(100, 25))
        for name, took in times.items():
            about = {"kind": "ours" if name in ours else "peer", "name": name, "dtype": "fp32"}
            about |= {"keys": n, "width": WIDTH, "batch": 1, "cache": "warm"}
            found.append(Measurement("call", **about, **took.columns("us")))
        progress(done, len(SIZES))
    return found
