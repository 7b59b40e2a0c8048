"""Lookups through a sketch against the CPU's without one, to the bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import grace_kernels
from grace_kernels import Backend, Sketch, testing

from .journal import Wrong
from .place import Captured, Place, Tensors
from .problems import differences, poisoned

WIDTH = 5  # of the values


@dataclass(frozen=True)
class Found:
    """What `lookup` and `adapt_` returned, and the rows round those that `adapt_` may write."""

    lookup: Tensors
    adapt: Tensors
    around: Tensor

    def parts(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {
            "pruned lookup index": self.lookup[0],
            "pruned lookup distance": self.lookup[1],
            "pruned adapt index": self.adapt[0],
            "pruned adapt distance": self.adapt[1],
            "rows written through a sketch": self.around,
        }


def cases(seed: int, numbers: Iterable[int]) -> Iterator[testing.SketchCase]:
    """Return the random codebooks of these numbers."""
    return (testing.random_codebook(seed * 1_000_000 + number) for number in numbers)


def found(
    case: testing.SketchCase, device: torch.device, sketch: Sketch | None, backend: Backend
) -> Found:
    """Run both operators on a device. The count is given, so that triton compiles once."""
    batch, n = len(case.query), len(case.keys)
    query, keys, radii = (t.to(device) for t in (case.query, case.keys, case.radii))
    count = torch.tensor(n if case.count is None else case.count, device=device)
    values = torch.arange(float(n * WIDTH), device=device).view(n, WIDTH)
    around = torch.full((2 * batch + 1, WIDTH), -1.0, device=device)
    rows = torch.arange(batch, device=device)
    first = 2 * rows + 1  # a row that must stay as it is on either side
    how: dict[str, Any] = {"sketch": sketch, "backend": backend}
    with poisoned():
        lookup = grace_kernels.lookup(query, keys, radii, count, **how)
        adapt = grace_kernels.adapt_(
            around, query, rows, first, first + 1, keys, radii, values, count, **how
        )
    return Found(lookup, adapt, around)


def compare(
    place: Place, case: testing.SketchCase, backends: tuple[Backend, ...]
) -> dict[Backend, list[str]]:
    """Return what each backend gets wrong with a sketch, against the CPU without one."""
    right = found(case, torch.device("cpu"), None, place.truth)
    sketch = case.sketch().to(place.device)
    told = [tensor.clone() for tensor in sketch.tensors()[:-1]]
    wrong = {}
    for backend in backends:
        got = found(case, place.device, sketch, backend)
        wrong[backend] = differences(right, got)
        if not all(map(torch.equal, sketch.tensors()[:-1], told)):
            wrong[backend].append("the sketch was written to")
    return wrong


def clustered(n: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return keys `[n, dim]` in clusters and queries `[16, dim]`, every second one near a key."""
    generator = torch.Generator().manual_seed(n + dim)
    centres = 3 * torch.randn(n // 50 + 1, dim, generator=generator)
    at = torch.randint(len(centres), (n,), generator=generator)
    keys = centres[at] + torch.randn(n, dim, generator=generator)
    query = keys[torch.randint(n, (16,), generator=generator)]
    query = query + 0.01 * torch.randn(16, dim, generator=generator)
    query[::2] += torch.randn(8, dim, generator=generator)
    return query.to(dtype), keys.to(dtype)


def spares(place: Place, backend: Backend) -> dict[str, Any]:
    """Fit a sketch on the device; see that its bounds hold and that hardly a key is read."""
    result: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        n, dim = place.pick(50_000, 20_000, 3000), place.pick(768, 768, 96)
        query, keys = clustered(n, dim, dtype)
        radii = torch.ones(n)
        right = grace_kernels.lookup(query, keys, radii, backend=place.truth)
        there = query.to(place.device), keys.to(place.device), radii.to(place.device)
        sketch = Sketch.fit(*there[1:])
        misled = sketch.faults(*there[1:])
        if misled:
            raise Wrong(f"{len(misled)} bounds of a sketch fitted on the device do not hold")
        name = str(dtype).removeprefix("torch.")
        for batch in (1, 16):
            sketch.counters.zero_()
            for start in range(0, 16, batch):
                part = slice(start, start + batch)
                with poisoned():
                    got = grace_kernels.lookup(
                        there[0][part], *there[1:], sketch=sketch, backend=backend
                    )
                same = (
                    testing.same_bits(g.cpu(), r[part]) for g, r in zip(got, right, strict=True)
                )
                if not all(same):
                    raise Wrong(f"{name}, {batch} at a time: the answer is not that of the CPU")
            counts = sketch.counts()
            result[f"{name}, {batch} at a time"] = str(counts)
            if counts["queries"] != 16 or counts["pairs"] != 16 * n:
                raise Wrong(f"{name}: 16 queries of {n} keys are counted as {counts}", result)
            if counts["scanned"] or counts["scored"] > 0.01 * counts["pairs"]:
                raise Wrong(f"{name}: hardly a key is within reach, read were {counts}", result)
    return result


def told(place: Place, backend: Backend) -> dict[str, Any]:
    """Capture once; then tell the sketch of changes in place, and replay: nothing may be stale."""
    edits = place.pick(300, 100, 20)
    capacity, dim = 200 + edits, 96
    query, keys = clustered(capacity, dim, torch.bfloat16)
    radii = torch.ones(capacity)
    there = [t.to(place.device) for t in (query[:8], keys, radii)]
    count = torch.tensor(200, device=place.device)
    sketch = Sketch.fit(there[1], there[2], 200)
    call = partial(grace_kernels.lookup, *there, count, sketch=sketch, backend=backend)
    captured = Captured(place, call)
    generator = torch.Generator().manual_seed(place.seed)
    hits = 0
    for edit in range(edits):
        used = int(count)
        slot = used if edit % 3 else int(torch.randint(used, (), generator=generator))
        # Every other one beyond the radii that the sketch was fitted with, which were all 1.
        away = (0.02, 0.15)[edit % 2]
        near = query[edit % 8].float() + away * torch.randn(dim, generator=generator)
        keys[slot] = near.to(keys.dtype)
        radii[slot] = (-torch.inf, 0.1, 0.5, 2.0, 30.0)[edit % 5]
        for target, source in ((there[1], keys), (there[2], radii)):
            target[slot].copy_(source[slot])
        sketch.update_radii_(there[2], slot, slot + 1)
        sketch.extend(there[1], slot, slot + 1)
        count.fill_(max(used, slot + 1))
        for out, poison in zip(captured.outputs, (-7, float("nan")), strict=True):
            out.fill_(poison)
        captured.replay()
        rows = max(used, slot + 1)
        right = grace_kernels.lookup(query[:8], keys, radii, rows, backend=place.truth)
        hits += int((right[0] >= 0).sum())
        pairs = zip(captured.outputs, right, strict=True)
        if not all(testing.same_bits(g.cpu(), r) for g, r in pairs):
            raise Wrong(f"after edit {edit} (slot {slot} of {rows}) the answer is stale")
    return {"edits": edits, "hits": hits, "rows sketched": sketch.rows}


CHECKS = {"a sketch spares keys": spares, "a graph sees what a sketch is told": told}
