"""Inputs of lookups by regime, and some whose distances show how they were computed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

INF, NAN = math.inf, math.nan


@dataclass(frozen=True)
class Case:
    """Inputs of one lookup and why they are there."""

    name: str
    query: Tensor
    keys: Tensor
    radii: Tensor
    count: int | None = None


def ties_within_rounding(
    dtype: torch.dtype, keys: int, dim: int, scale: float, seed: int, centre: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return a query `[1, dim]` and `[keys, dim]` keys around it whose distances nearly tie.

    Every key is the query (all `centre`) plus a shuffle, with random signs, of one vector: the
    exact distances tie, while fp32 sums scatter. In float32 some elements are moved by some units
    in the last place besides, which takes the distances a few such units apart. Around a query
    other than zero the shuffled vector is first rounded to what the key can hold exactly.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    offset = normal(dim) * scale
    if centre != 0:
        centre = 2.0 ** round(math.log2(abs(centre)))
        unit = centre * torch.finfo(dtype).eps * 8
        offset = (offset / unit).round() * unit
    shuffle = torch.rand(keys, dim, generator=generator).argsort(dim=1)
    sign = torch.where(normal(keys, dim) < 0, -1.0, 1.0)
    near = (offset[shuffle] * sign).to(dtype)
    if dtype == torch.float32:
        moved = near * (1 + torch.finfo(dtype).eps * (normal(keys, dim) * dim**0.5 / 3).round())
        near = torch.where(normal(keys, dim) > 1.0, moved, near)
    query = torch.full((1, dim), centre, dtype=dtype)
    return query, query + near if centre != 0 else near


def order_shows(dtype: torch.dtype, batch: int, dim: int) -> tuple[Tensor, Tensor]:
    """Return queries `[batch, dim]` and one key of zeros whose distance depends on the sum's order.

    In units of 2^16, two squares make up s = 1.01.., one of 2^-24 leaves the sum half way between
    two float32 (chosen so that their roots differ), and a few are 2^-54: whether these are lost one
    by one or first add up to something that tips the balance depends on where they stand.
    """
    generator = torch.Generator().manual_seed(dim)
    query = torch.where(torch.rand(batch, dim, generator=generator) < 6 / dim, 2.0**-19, 0.0)
    for row in query:
        where = torch.randperm(dim, generator=generator)[:3]
        row[where] = torch.tensor([180.0, 184.0, 2.0**-4])
    return query.to(dtype), torch.zeros(1, dim, dtype=dtype)


def swap_shows(dtype: torch.dtype, place: int, lane: int) -> tuple[Tensor, Tensor]:
    """Return a query `[1, 600]` and two keys of which the second is nearest, by the order alone.

    In units of 2^20, the lane of the first key adds three times 2^-54 at its elements place - 2 to
    place, which together still count beside the 1 that comes next, and one by one would not. With
    2^-24 from another lane this makes s = 1 + 2^-23; were the last of them swapped with its
    neighbour, s would be 1 as for the second key, and the first would win. `place` is 2 to 14.
    """
    query, keys = torch.zeros(1, 600), torch.zeros(2, 600)
    elements = [n // 8 * 256 + lane * 8 + n % 8 for n in range(place - 2, place + 2)]
    keys[0, elements] = torch.tensor([2.0**-17] * 3 + [2.0**10])
    keys[0, (lane + 5) % 32 * 8] = 0.25
    keys[1, 0] = 2.0**10
    return query.to(dtype), keys.to(dtype)


def fusion_shows(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return queries and a key `[B, 600]` for which a fused multiply-add gives another distance.

    One lane, in units of 2^20, adds 6 * 2^-56, 3 * 2^-26, r = (20 / 64)^2 and last
    (1 + 2^-27)^2 = 1 + 2^-26 + 2^-54. Its last term is lost, unless fused: then the sum passes the
    middle of two float32 whose roots differ. The queries differ in the lane.
    """
    lanes = (0, 1, 5, 10)  # the last but one and the last chunk of 256, the latter incomplete
    starts = [256 + 8 * lane for lane in lanes] + [512 + 8 * lane for lane in lanes]
    query, key = torch.zeros(len(starts), 600), torch.zeros(1, 600)
    for row, start in zip(query, starts, strict=True):
        row[start % 256 : start % 256 + 6] = 2.0**-18
        row[start : start + 3] = 2.0**-3
        row[start + 3], row[start + 4] = 320.0, 2.0**10
        key[0, start + 4] = -(2.0**-17)
    for row, start in zip(query, starts, strict=True):
        others = [s + 4 for s in starts if s != start]
        row[others] = key[0, others]
    return query.to(dtype), key.to(dtype)


def regimes(dtype: torch.dtype) -> Iterator[Case]:
    """Yield small inputs by regime: shapes, norms, ties, special values, liveness, counts."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def case(
        name: str, query: Tensor, keys: Tensor, radii: Tensor | float, count: int | None = None
    ) -> Case:
        if not isinstance(radii, Tensor):
            radii = torch.full((keys.shape[0],), radii)
        return Case(name, query.to(dtype), keys.to(dtype), radii.float(), count)

    for dim in (1, 2, 7, 8, 9, 63, 64, 65, 255, 256, 257, 300):
        keys = normal(11, dim)
        query = torch.cat([normal(3, dim), keys[4:5]])
        yield case(f"width {dim}", query, keys, math.sqrt(2 * dim))
    yield case("no elements per row", normal(2, 0), normal(3, 0), 0.0)
    for n in (0, 1, 2, 3, 9):
        for batch in (0, 1, 2, 3, 5):
            yield case(f"{n} keys, {batch} queries", normal(batch, 40), normal(n, 40), 9.0)

    largest = float(torch.finfo(dtype).max)
    for scale in (1e-3, 1.0, 1e2, 1e4):
        if scale * 5 > largest:
            continue
        keys = normal(17, 96) * scale
        query = torch.cat([keys[:2], keys[2:4] * 1.0005, normal(2, 96) * scale])
        yield case(f"elements near {scale:g}", query, keys, 5 * scale)

    x = normal(1, 80)
    yield case("all keys equal", x + 0.25, x.expand(20, 80), 100.0)
    twin = normal(12, 80)
    twin[9] = twin[3]
    yield case("a duplicate of an earlier key", twin[9:10], twin, 0.0)
    step = x.to(dtype).repeat(10, 1)
    for n in range(10):
        step[n, n * 7] = torch.nextafter(step[n, n * 7], torch.tensor(9.0, dtype=dtype))
    yield case("keys one step of the last place apart", x, step, 1.0)
    yield case("distances that nearly tie", *ties_within_rounding(dtype, 40, 200, 1.0, 1), 99.0)

    for dim in (40, 300, 700):
        yield case(f"the order of {dim} squares shows", *order_shows(dtype, 24, dim), INF)
    yield case("a fused multiply-add would show", *fusion_shows(dtype), INF)

    tiny = float(torch.finfo(dtype).tiny)
    yield case("subnormal elements", normal(3, 50) * tiny / 8, normal(9, 50) * tiny / 8, tiny)
    yield case("a radius of zero, squares underflow", x * tiny, (x * tiny).repeat(3, 1), 0.0)
    yield case("differences overflow", normal(2, 33).sign() * largest, normal(9, 33) * 1.0, INF)
    if dtype != torch.float16:
        edge = torch.full((6, 64), math.sqrt(3.4028234e38 / 64))
        edge *= torch.tensor([1.01, 1.000001, 1.0, 1.0000001, 0.999999, 1.01])[:, None]
        yield case("squares overflow at the edge", torch.zeros(1, 64), edge, INF)

    def with_one(value: float) -> Tensor:
        rows = normal(8, 70)
        rows[3, 65] = value
        return rows

    for value in (NAN, INF, -INF):
        yield case(f"{value} in a query", with_one(value), normal(9, 70), INF)
        yield case(f"{value} in a key", normal(2, 70), with_one(value), 99.0)
        yield case(f"{value} in every key", normal(2, 70), normal(5, 70) * value, INF)
    both = with_one(INF)
    yield case("an infinity in query and key", both[3:4], both, INF)

    keys = normal(10, 30)
    near = keys + 0.01 * normal(10, 30)
    radii = torch.full((10,), 1.0)
    radii[torch.tensor([0, 4])] = -INF
    yield case("dead slots", near, keys, radii)
    yield case("every slot dead", near, keys, -INF)
    yield case("negative radii block", near, keys, torch.arange(-5.0, 5.0))
    yield case("only negative radii", near, keys, -1.0)
    yield case("a NaN radius never answers", near, keys, torch.tensor([NAN, 1.0] * 5))
    yield case("only NaN radii", near, keys, NAN)
    yield case("one radius of +inf", normal(6, 30), keys, torch.tensor([0.1] * 9 + [INF]))
    yield case("a radius of -0.0", keys, keys, -0.0)

    poisoned = torch.cat([keys, torch.full((5, 30), NAN)])
    wide = torch.cat([radii, torch.tensor([INF, NAN, 1.0, INF, -INF])])
    for count in (0, 1, 9, 10):
        yield case(f"count {count}, poisoned rows after it", near, poisoned, wide, count)
