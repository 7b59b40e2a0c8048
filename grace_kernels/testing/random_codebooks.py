"""Small random codebooks, with their sketches' histories, that a pruned lookup may get wrong.

They are made for edges, see `random_codebook`, and shared by the tests on a CPU and the check on a
GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..reference import squared_distances
from ..sketch import Sketch
from .inputs import INF, NAN


class Draw:
    """Random numbers that follow from two numbers, the same wherever they are drawn."""

    def __init__(self, seed: int, number: int) -> None:
        self.generator = torch.Generator().manual_seed(seed * 1_000_003 + number)

    def normal(self, *shape: int) -> Tensor:
        """Return float32 of this shape, of the normal distribution."""
        return torch.randn(*shape, generator=self.generator)

    def below(self, n: int) -> int:
        """Return a whole number of at least 0, below `n`."""
        return int(torch.randint(n, (), generator=self.generator))

    def one_of(self, choices: Any) -> Any:
        """Return one of a sequence."""
        return choices[self.below(len(choices))]

    def chance(self, probability: float) -> bool:
        """Return True with this probability."""
        return float(torch.rand((), generator=self.generator)) < probability

    def where(self, n: int, probability: float) -> Tensor:
        """Return `[n]` bool, each True with this probability."""
        return torch.rand(n, generator=self.generator) < probability

    def rows(self, n: int, size: int) -> Tensor:
        """Return `[size]` int64 of at least 0, below `n`."""
        return torch.randint(n, (size,), generator=self.generator)

    def range(self, n: int) -> tuple[int, int]:
        """Return `first` and `last` of a part of `0..n-1`, `last` not included; it may be empty."""
        first = self.below(n + 1)
        return first, first + self.below(n - first + 1)


@dataclass(frozen=True)
class SketchCase:
    """Inputs of one lookup, and the history of its sketch.

    The sketch is fitted to the first `fit_rows` rows of `fit_keys` and `fit_radii`. Then ranges
    `(first, last, rows)` are written and told, in order, which ends in `keys` and `radii`, but for
    keys of dead slots and rows from `count` on: those nobody need be told of. Where the rows told
    of end before `count`, the rest is not covered. Every radius below `count` has been told.
    """

    name: str
    query: Tensor
    keys: Tensor
    radii: Tensor
    count: int | None
    fit_keys: Tensor
    fit_radii: Tensor
    fit_rows: int
    later_keys: tuple[tuple[int, int, Tensor], ...]
    later_radii: tuple[tuple[int, int, Tensor], ...]
    spare: int  # rows that the memory of the sketch is grown by at the end
    active: bool

    def sketch(self) -> Sketch:
        """Make the sketch, on a CPU, by way of its history."""
        keys, radii = self.fit_keys.clone(), self.fit_radii.clone()
        made = Sketch.fit(keys, radii, self.fit_rows)
        for first, last, rows in self.later_radii:
            radii[first:last] = rows
            made.update_radii_(radii, first, last)
        for first, last, rows in self.later_keys:
            keys[first:last] = rows
            made.extend(keys, first, last)
        if self.spare:
            made = made.resized(len(keys) + self.spare)
        made.active = self.active
        return made


def random_codebook(seed: int, *, dim: int | None = None, batch: int | None = None) -> SketchCase:
    """Return a small random codebook that a pruned lookup may get wrong; `seed` decides all of it.

    Of every three seeds in a row each has another dtype. Among them are pairs that share a radius
    of half their distance, radii that are a query's distance to the bit or a step beside it (T of
    the bounds among them, 0 among those), some or more than 32 outliers among the radii, slots that
    are dead, ties, duplicates, values that are not finite, subnormal or beyond the scales of the
    sketch, rows not covered, keys and radii changed after the fit, poison behind the count.

    The width and the number of queries may be chosen, for a kernel that is compiled for them.
    """
    draw = Draw(71, seed)
    dtype = (torch.bfloat16, torch.float16, torch.float32)[seed % 3]
    n = draw.below(draw.one_of((5, 40, 80, 240)))
    n += draw.one_of((0, 33, 33)) if n > 5 else 0
    drawn_dim = draw.one_of((1, 2, 7, 8, 9, 16, 24, 31, 40, 40, 63, 64, 65, 80, 130))
    drawn_batch = draw.one_of((1, 1, 2, 3, 5, 8, 1 + draw.below(20)))
    dim, batch = dim or drawn_dim, batch or drawn_batch
    kind = draw.one_of(tuple(_KINDS))
    keys = _KINDS[kind](draw, n, dim).to(dtype)
    if n > 1 and draw.chance(0.3):
        keys[draw.rows(n, 1 + n // 8)] = keys[draw.rows(n, 1 + n // 8)]
    query, pairs = _queries(draw, keys, batch)
    radii = _drawn_radii(draw, query, keys, pairs)

    fit_rows = draw.one_of((n, n, draw.below(n + 1)))
    covered = fit_rows + draw.one_of((n - fit_rows, draw.below(n - fit_rows + 1)))
    fit_radii, later_radii = _history(draw, radii, n, lambda size: _stray(draw, size))
    if fit_rows < n:
        later_radii.append((fit_rows, n, radii[fit_rows:].clone()))
    scale = draw.one_of((0.1, 1.0, 30.0))
    fit_keys, later_keys = _history(
        draw, keys, fit_rows, lambda size: (draw.normal(size, dim) * scale).to(dtype)
    )
    if fit_rows < covered:
        later_keys.append((fit_rows, covered, keys[fit_rows:covered].clone()))

    count = draw.one_of((None, None, n, draw.below(n + 1)))
    dead = (radii == -INF) & draw.where(n, 0.5)
    keys[dead] = draw.one_of((NAN, 0.0, 1.0))
    if count is not None and draw.chance(0.7):
        keys[count:] = draw.one_of((NAN, INF, 0.0))
        radii[count:] = draw.one_of((NAN, INF))
    name = f"codebook {seed}: {kind}, {n} x {dim} {dtype}, {batch} queries, {covered} covered"
    return SketchCase(
        name=name.replace("torch.", ""),
        query=query,
        keys=keys,
        radii=radii,
        count=count,
        fit_keys=fit_keys,
        fit_radii=fit_radii,
        fit_rows=fit_rows,
        later_keys=tuple(later_keys),
        later_radii=tuple(later_radii),
        spare=draw.one_of((0, 0, 0, 70)),
        active=not draw.chance(0.03),
    )


def _clusters(draw: Draw, n: int, dim: int) -> Tensor:
    centres = draw.normal(1 + n // 6, dim) * draw.one_of((3.0, 30.0))
    return centres[draw.rows(len(centres), n)] + draw.normal(n, dim) * draw.one_of((0.02, 0.3))


def _sphere(draw: Draw, n: int, dim: int) -> Tensor:
    return torch.nn.functional.normalize(draw.normal(n, dim), dim=1) * draw.one_of((1.0, 100.0))


def _massive(draw: Draw, n: int, dim: int) -> Tensor:
    keys = draw.normal(n, dim)
    keys[:, draw.below(dim)] = 200.0 + draw.normal(n)
    return keys


def _not_finite(draw: Draw, n: int, dim: int) -> Tensor:
    keys = draw.normal(n, dim)
    if n:
        for _ in range(3):
            keys[draw.below(n), draw.below(dim)] = draw.one_of((NAN, INF, -INF, 6e4))
    return keys


_KINDS: dict[str, Callable[[Draw, int, int], Tensor]] = {
    "normal": lambda draw, n, dim: draw.normal(n, dim),
    "spectrum": lambda draw, n, dim: draw.normal(n, dim) * 4 / torch.arange(1, dim + 1.0),
    "clusters": _clusters,
    "sphere": _sphere,
    "offset": lambda draw, n, dim: draw.normal(n, dim) + draw.one_of((10.0, 300.0)),
    "massive dimension": _massive,
    "lattice": lambda draw, n, dim: 4 * draw.normal(n, dim).clamp(-1, 1).round(),
    "norms": lambda draw, n, dim: (
        draw.normal(n, dim) * (10 ** (2 * draw.normal(n, 1))).clamp(0, 9e3)
    ),
    "subnormal": lambda draw, n, dim: draw.normal(n, dim) * 1e-40,
    "small": lambda draw, n, dim: draw.normal(n, dim) * 1e-24,
    "not finite": _not_finite,
}


def _queries(draw: Draw, keys: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Return queries `[batch, D]` in the places that are hard, and some pairs of rows `[P, 2]`."""
    n, dim = keys.shape
    if n == 0:
        return draw.normal(batch, dim).to(keys.dtype), torch.zeros(0, 2, dtype=torch.int64)
    pairs = torch.stack([draw.rows(n, batch), draw.rows(n, batch)], dim=1)
    if draw.chance(0.7):  # the partner is the nearest other row
        gaps = torch.cdist(keys[pairs[:, 0]].float(), keys.float()).nan_to_num(nan=INF, posinf=INF)
        gaps[torch.arange(batch), pairs[:, 0]] = INF
        pairs[:, 1] = gaps.argmin(dim=1)
    first, second = keys[pairs[:, 0]].float(), keys[pairs[:, 1]].float()
    size = (first - second).abs().nan_to_num(0.0, 0.0, 0.0).mean()
    noise = draw.normal(batch, dim) * size
    far = draw.normal(batch, dim) * keys.float().nan_to_num(0.0, 0.0, 0.0).abs().mean() * 3
    places = torch.stack(
        [
            first,
            (first + second) / 2,
            first + (second - first) * draw.one_of((0.499, 0.4999, 0.25)),
            first + noise * draw.one_of((1e-3, 0.05, 0.5)),
            far,
            first + 0.1 * (first - second),
        ]
    )
    query = places[draw.rows(len(places), batch), torch.arange(batch)].to(keys.dtype)
    if draw.chance(0.05):
        query[draw.below(batch), draw.below(dim)] = draw.one_of((NAN, INF, -INF))
    return query, pairs


def _drawn_radii(draw: Draw, query: Tensor, keys: Tensor, pairs: Tensor) -> Tensor:
    n = len(keys)
    if n == 0:
        return torch.zeros(0)
    near = squared_distances(query, keys).nan_to_num(nan=INF, posinf=INF).double().sqrt().float()
    least, nearest = near.min(dim=1)
    usual = least[least.isfinite() & (least > 0)]
    typical = float(usual.median()) if len(usual) else 1.0
    shape = draw.one_of(("even", "even", "drawn", "of one query", "zero", "everything"))
    radii = torch.full((n,), typical * draw.one_of((0.01, 0.1, 0.5, 1.0, 1.5)))
    if shape == "drawn":
        radii = radii * 2 * torch.rand(n, generator=draw.generator)
    elif shape == "of one query":  # the threshold of the bounds is a distance, or just beside it
        radii.fill_(float(_beside(draw, draw.one_of(least))))
    elif shape == "zero":
        radii.fill_(draw.one_of((0.0, -0.0, 1e-45)))
    elif shape == "everything":
        radii.fill_(typical * 1e3)
    if draw.chance(0.5):  # split pairs: each has half their distance
        half = squared_distances(keys[pairs[:, 0]], keys[pairs[:, 1]]).diagonal()
        half = half.nan_to_num(nan=INF, posinf=INF).double().sqrt().float() / 2
        radii[pairs[:, 0]] = half
        radii[pairs[:, 1]] = half
    if draw.chance(0.5):
        many = min(n, draw.one_of((1, 3, 32, 33, 50, 50)))
        factor = draw.one_of((1.5, 4.0, 100.0, INF))
        out = torch.randperm(n, generator=draw.generator)[:many]
        radii[out] = typical * factor * (0.5 + torch.rand(many, generator=draw.generator))
    if draw.chance(0.3):
        odd = torch.tensor([-INF, -INF, -INF, -1.0, 0.0, -0.0, NAN, INF])
        chosen = odd[draw.rows(len(odd), n)]
        radii = torch.where(draw.where(n, draw.one_of((0.1, 0.5, 1.0))), chosen, radii)
    if draw.chance(0.4):
        for b in range(len(query)):  # the nearest one's radius, or a farther one's
            row = int(draw.one_of((nearest[b], nearest[b], draw.below(n))))
            radii[row] = _beside(draw, near[b, row])
    return radii


def _beside(draw: Draw, distance: Tensor) -> Tensor:
    """Return a distance, or the float32 next to it on one side."""
    step = draw.one_of((0.0, 0.0, -INF, INF))
    return distance if step == 0 else torch.nextafter(distance, torch.tensor(step))


def _stray(draw: Draw, size: int) -> Tensor:
    """Return radii `[size]` that entries may have had before."""
    odd = torch.tensor([-INF, -INF, 0.0, 0.0, NAN, 1e-3, 1.0, 1e4, INF])
    return odd[draw.rows(len(odd), 1)].expand(size).clone()


def _history(
    draw: Draw, final: Tensor, rows: int, other: Callable[[int], Tensor]
) -> tuple[Tensor, list[tuple[int, int, Tensor]]]:
    """Return what `final` once was, and the ranges written since, all below `rows`."""
    before, later = final.clone(), []
    for _ in range(draw.one_of((0, 0, 1, 3))):
        first, last = draw.range(rows)
        before[first:last] = other(last - first)
        if draw.chance(0.3):
            later.append((first, last, other(last - first)))
        later.append((first, last, final[first:last].clone()))
    return before, later
