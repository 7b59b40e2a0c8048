"""Many queries at once, which the CPU kernels take by |x|^2 - 2 x.k + |k|^2: the reference's bits.

That form needs at least 128 keys, of which the first eight are always taken by differences.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import grace_kernels
from grace_kernels.testing import same_bits, ties_within_rounding

from .conftest import COMPILED, ISAS, using_isa

pytestmark = pytest.mark.skipif(not COMPILED, reason="not compiled")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INF, NAN = math.inf, math.nan


def agree(query: Tensor, keys: Tensor, radii: Tensor | float = INF) -> Tensor:
    """Assert that every instruction set gives the reference's bits; return `nearest`'s."""
    if not isinstance(radii, Tensor):
        radii = torch.full((len(keys),), radii)
    for operation in (grace_kernels.lookup, grace_kernels.nearest):
        expected = operation(query, keys, radii, backend="reference")
        for isa in ISAS:
            with using_isa(isa):
                index, distance = operation(query, keys, radii, backend="cpu")
            assert index.tolist() == expected[0].tolist(), isa
            assert same_bits(distance, expected[1]), isa
    return expected[0]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("batch", [5, 7, 8, 16, 17, 21, 64, 65, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_queries_is_answered_as_by_the_reference(
    dtype: torch.dtype, batch: int
) -> None:
    for dim in (1, 31, 257):
        keys = normal(dim, 211, dim).to(dtype)
        query = normal(batch, batch, dim)
        query[::3] = keys[8 + torch.arange(len(query[::3])) % 200].float() + 0.01 * query[::3]
        agree(query.to(dtype), keys, math.sqrt(dim))


@pytest.mark.parametrize("dim", [768, 1001, 4100, 20011])
@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_keys_are_taken_in_pieces(dtype: torch.dtype, dim: int) -> None:
    keys = normal(dim, 160, dim).to(dtype)
    query = torch.cat([normal(1, 5, dim).to(dtype), keys[100:103], keys[-1:]])
    assert agree(query, keys, 9.0)[5:].tolist() == [100, 101, 102, 159]


@pytest.mark.parametrize("offset", [0.0, 1.0, 30.0, 1e3, 1e4, 1e5, 1e6])
def test_norms_far_above_the_distances_mislead_nobody(offset: float) -> None:
    # Up to an offset of some 1e3 most keys are ruled out, though the nearest are not told apart.
    for dim in (40, 300, 768):
        centre = normal(dim, 1, dim).sign() * offset
        for seed in range(4):
            spread = 10.0 * normal(seed, 200, dim)
            keys = centre + spread
            query = centre + spread[60:77] + 0.1 * normal(seed + 1, 17, dim)
            keys[100:180] = query[:16].repeat(5, 1) + 0.1 * normal(seed + 2, 80, dim)
            agree(query, keys)


def test_products_that_lose_all_they_may_rule_out_no_nearest_key() -> None:
    # Next to the first products of a piece the others are just below half a unit in the last place
    # and lost one by one, so that a near key seems farther by 0.3 than it is, more than a third of
    # what the margin allows for. The others differ late, or direct differences would take them.
    x = torch.full((768,), 0.99 * 2.0**-6)
    x[torch.arange(768) % 256 < 2] = 64.0
    keys = x.repeat(300, 1)
    keys[:, 100:] += normal(0, 300, 668)
    for slot, place in ((3, 50), (130, 2), (200, 700), (250, 255)):
        keys[slot] = x
        keys[slot, place] += 0.3 - slot / 1000
    for batch in (8, 16, 40):
        assert agree(x.expand(batch, 768), keys).tolist() == [250] * batch


@pytest.mark.parametrize("dtype", DTYPES)
def test_near_ties_among_many_keys_are_told_apart(dtype: torch.dtype) -> None:
    for seed, centre in enumerate((0.0, 1.0, 16.0, 100.0)):
        query, near = ties_within_rounding(dtype, 150, 200, 1.0, seed, centre)
        far = query + 40 * normal(seed, 600, 200).to(dtype)
        keys = torch.cat([far[:300], near, far[300:]])
        agree(query.expand(12, 200), keys)
        agree(query.expand(12, 200), near)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_lowest_of_equal_keys_wins(dtype: torch.dtype) -> None:
    keys = normal(0, 200, 90).to(dtype)
    keys[120:] = keys[40:120]
    query = keys[[170, 150, 121, 199, 60, 41, 7, 119]]
    assert agree(query, keys, 0.0).tolist() == [90, 70, 41, 119, 60, 41, 7, 119]
    assert agree(query, keys[:1].expand(200, 90)).tolist() == [0] * 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_finite_harm_no_other(dtype: torch.dtype) -> None:
    keys, query = normal(0, 200, 70), normal(1, 20, 70)
    keys[9::7, 3], keys[11::7, 65], keys[12::7, 0] = NAN, INF, -INF
    query[2, 69], query[5, 0], query[9, 40] = NAN, INF, -INF
    agree(query.to(dtype), keys.to(dtype))
    agree(query.to(dtype), keys.to(dtype), 9.0)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-21, 1e17, 1e18, 1e19, 1e20, 3e37])
def test_squares_may_leave_the_range_of_fp32(scale: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        keys, query = scale * normal(0, 200, 70), scale * normal(1, 20, 70)
        query[3], query[4], keys[150] = 1e-5 * query[3], 0.0, 0.0
        keys[20:30] *= 1e-3
        agree(query.to(dtype), keys.to(dtype))


def test_a_norm_that_fp32_cannot_hold_hides_no_key() -> None:
    # That of key 170 is 3.5e38; its distance squared is 3.16e38, those of all others 3.2 to 3.3e38.
    along = normal(0, 70)
    along *= math.sqrt(3.5e38) / along.double().norm().item()
    far = torch.linspace(3.2e38, 3.3e38, 200)[normal(2, 200).argsort(), None]
    keys = 0.05 * along + normal(1, 200, 70).sign() * (far / 70).sqrt()
    keys[170] = along
    assert agree((0.05 * along).expand(8, 70), keys).tolist() == [170] * 8


def test_dead_slots_and_negative_radii_count_as_ever() -> None:
    keys = normal(0, 200, 70)
    query = keys[50:66] + 0.01 * normal(1, 16, 70)
    radii = torch.full((200,), 2.0)
    radii[50:66:2], radii[53:66:4], radii[100:150] = -INF, -1.0, NAN
    agree(query, keys, radii)
    agree(query, keys, torch.full((200,), -INF))
    assert agree(keys[199:].expand(8, 70), keys, radii).tolist() == [199] * 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_far_apart_in_memory_and_at_any_address_are_read_alike(dtype: torch.dtype) -> None:
    wide = normal(0, 200, 517).to(dtype)
    agree(wide[50:60, 3:300] + 0.5, wide[:, 3:300], 15.0)
    agree(wide[50:60, 1:514:3], wide[:, 1:514:3], 15.0)
