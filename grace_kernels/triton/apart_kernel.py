"""The form `apart`: lookup_kernel.py in two launches, one that scans and one that answers.

The first keeps no more than intervals. A slice in which they do not decide leaves a mark, and what
its groups of keys know. The second has a program for each query: it sees all slices' intervals, has
the canonical s of those keys that can still win, four at a time, answers and writes the rows.

Neither needs a counter, since the second starts when the first has ended. Bytes moved: those of
lookup_kernel.py, and the groups of slices that are undecided.
"""

import triton
import triton.language as tl

from .lookup_kernel import (
    _INF,
    _NO_SLOT,
    _SLICES,
    _any,
    _asked,
    _how,
    _keep,
    _limit,
    _query,
    _scan,
    _slice,
    _squared_distances,
    _used,
    _write_rows,
    as_laid_out,
)

_SEVERAL = tl.constexpr(-2)  # in place of a slot


@triton.jit
def _leave(low_1, place_1, low_2, high_1, some_live, asks, group_bounds, group_places, program,
           begin):  # fmt: skip
    """Return bounds of the least s of the slice and the only key that can have it (-1: none is
    there, _SEVERAL: these are known by their groups, which are in memory).

    A key can have it if its low bound is at most the least high bound.
    """
    GROUPS: tl.constexpr = low_1.shape[0]
    BLOCK_B: tl.constexpr = low_1.shape[1]
    high = tl.min(high_1, axis=0)
    crowded = low_2 <= high[None, :]
    candidate = ((place_1 >= 0) & (low_1 <= high[None, :])) | crowded
    slot = begin + tl.max(tl.where(candidate, place_1, -1), axis=0)
    several = _any(crowded, 0) | (tl.sum(candidate.to(tl.int32), axis=0) > 1)
    slot = tl.where(several, _SEVERAL, slot)
    slot = tl.where(asks & some_live & _any(candidate, 0), slot, -1)
    if _any(slot == _SEVERAL, None):
        size: tl.constexpr = GROUPS * BLOCK_B
        at = tl.arange(0, GROUPS)[:, None] * BLOCK_B + tl.arange(0, BLOCK_B)[None, :]
        tl.store(group_bounds + program * (2 * size) + at, low_1)
        tl.store(group_bounds + program * (2 * size) + size + at, low_2)
        tl.store(group_places + program * size + at, place_1)
    return tl.min(low_1, axis=0), high, slot


def _scan_kernel(
    source, source_stride, query_row,  # as lookup_kernel.py
    keys, key_stride, radii, count,
    bounds, slots,
    group_bounds, group_places,  # of each program: fp32 [2, GROUPS, BLOCK_B], int32 [GROUPS, ..]
    B: tl.int64, S: tl.int64, C: tl.int64, D,
    HOW, relative, absolute,
    DIRECT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUPS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    slice_id, block = tl.program_id(0), tl.program_id(1)
    slices = tl.num_programs(0)
    _bounded, counted, writes = _how(HOW)
    begin, end = _slice(_used(count, counted, C), slice_id, slices)
    b = block.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    asks, asked = _asked(query_row, writes, b, B, S)
    query = source + asked * source_stride
    asks, square = _query(query, asks, D)
    end = tl.where(_any(asks, 0), end, begin)  # nothing to scan for
    low_1, place_1, low_2, high_1, radius, some_live = _scan(
        query, asks, square, keys, key_stride, radii, begin, end, D, relative, absolute,
        DIRECT, PRECISION, BLOCK_N, BLOCK_D, GROUPS, STAGES,
    )  # fmt: skip
    low, high, slot = _leave(
        low_1, place_1, low_2, high_1, some_live, asks, group_bounds, group_places,
        (block * slices + slice_id).to(tl.int64), begin,
    )  # fmt: skip
    _keep(bounds, slots, low, high, slot, radius, slice_id, block, slices, b, B)


@triton.jit
def _nearest_of(best, best_slot, query, slot, wanted, keys, key_stride, D):
    """Return the nearest of some keys, among equals the lowest, and of the best one so far."""
    query = query + tl.zeros_like(slot)
    s = _squared_distances(query, keys + slot * key_stride, wanted, D, 8)
    least = tl.min(tl.where(wanted, s, _INF), axis=0)
    lowest = tl.min(tl.where(wanted & (s == least), slot, _NO_SLOT), axis=0)
    nearer = (least < best) | ((least == best) & (lowest < best_slot))
    return tl.where(nearer, least, best), tl.where(nearer, lowest, best_slot)


@triton.jit
def _nearest_in_slice(best, best_slot, query, reach, group_bounds, group_places, column, begin, end,
                      keys, key_stride, radii, D, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
                      GROUPS: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    """Return the nearest key of a slice that is undecided, or the best one so far."""
    MEMBERS: tl.constexpr = BLOCK_N // GROUPS
    group = tl.arange(0, GROUPS)
    low_1 = tl.load(group_bounds + group * BLOCK_B + column)
    low_2 = tl.load(group_bounds + (GROUPS + group) * BLOCK_B + column)
    place = tl.load(group_places + group * BLOCK_B + column)
    # Groups with more keys that can win than they know: all of theirs.
    crowded = low_2 <= reach
    candidate = ((place >= 0) & (low_1 <= reach)) | crowded
    members = tl.cdiv(end - begin, BLOCK_N) * MEMBERS
    while _any(candidate, None):
        one = tl.min(tl.where(candidate, group, GROUPS))
        here = group == one
        every = _any(here & crowded, None)
        known = begin + tl.max(tl.where(here, place, -1))
        scored = tl.where(every, members, 1)
        for start in range(0, scored, PAIRS):
            at = start + tl.arange(0, PAIRS).to(tl.int64)
            slot = begin + at // MEMBERS * BLOCK_N + one * MEMBERS + at % MEMBERS
            slot = tl.where(every, slot, known)
            wanted = (at < scored) & (slot < end)
            wanted = wanted & (tl.load(radii + slot, mask=wanted, other=-_INF) != -_INF)
            best, best_slot = _nearest_of(best, best_slot, query, slot, wanted, keys, key_stride, D)
        candidate = candidate & (here == 0)
    return best, best_slot


@triton.jit
def _left(slots, bounds, b, B, start, slices):
    """Return what some slices left of query b: slots, low and high bounds of s."""
    at = start + tl.arange(0, _SLICES)
    there = at < slices
    at = b * slices + at
    slot = tl.load(slots + at, mask=there, other=-1)
    low = tl.load(bounds + at, mask=there, other=_INF)
    high = tl.load(bounds + B * slices + at, mask=there, other=_INF)
    return slot, low, high


def _answer_kernel(
    source, source_stride, query_row,
    keys, key_stride, radii, count,
    index, distance,
    bounds, slots, group_bounds, group_places,
    hidden, hidden_row, hidden_column, first_row, last_row,
    values, value_row, value_column,
    B: tl.int64, S: tl.int64, R: tl.int64, C: tl.int64, D, V,
    HOW, slices,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    bounded, counted, writes = _how(HOW)
    n = _used(count, counted, C)
    b = tl.program_id(0).to(tl.int64)
    block, column = b // BLOCK_B, b % BLOCK_B
    _asks, asked = _asked(query_row, writes, b, B, S)
    query = source + asked * source_stride

    largest = bounds + 2 * B * slices + block * slices
    bound = tl.full([_SLICES], _INF, tl.float32)
    radius = tl.full([_SLICES], -_INF, tl.float32)
    for start in range(0, slices, _SLICES):
        slot, _low, high = _left(slots, bounds, b, B, start, slices)
        bound = tl.minimum(bound, tl.where(slot == -1, _INF, high))
        at = start + tl.arange(0, _SLICES)
        radius = tl.maximum(radius, tl.load(largest + at, mask=at < slices, other=-_INF))
    limit = tl.where(bounded, _limit(tl.max(radius, axis=0)), _INF)
    bound_of_all = tl.minimum(tl.min(bound, axis=0), limit)

    best = tl.max(tl.full([1], _INF, tl.float32), axis=0)
    best_slot = tl.max(tl.full([1], _NO_SLOT, tl.int64), axis=0)
    place = tl.arange(0, _SLICES)
    nth = tl.arange(0, PAIRS)
    for start in range(0, slices, _SLICES):
        slot, low, high = _left(slots, bounds, b, B, start, slices)
        only = (slot >= 0) & (low <= bound_of_all)
        rank = tl.cumsum(only.to(tl.int32), axis=0) - 1
        for first in range(0, tl.sum(only.to(tl.int32), axis=0), PAIRS):
            pick = only[None, :] & (rank[None, :] == (first + nth)[:, None])
            one = tl.sum(tl.where(pick, slot[None, :], 0), axis=1)
            best, best_slot = _nearest_of(
                best, best_slot, query, one, _any(pick, 1), keys, key_stride, D
            )
        undecided = (slot == _SEVERAL) & (low <= bound_of_all)
        while _any(undecided, None):
            one = tl.min(tl.where(undecided, place, _SLICES))
            here = place == one
            reach = tl.minimum(tl.min(tl.where(here, high, _INF)), bound_of_all)
            begin, end = _slice(n, start + one, slices)
            program = (block * slices + start + one).to(tl.int64)
            best, best_slot = _nearest_in_slice(
                best, best_slot, query, reach, group_bounds + program * (2 * GROUPS * BLOCK_B),
                group_places + program * (GROUPS * BLOCK_B), column, begin, end,
                keys, key_stride, radii, D, BLOCK_B, BLOCK_N, GROUPS, PAIRS,
            )  # fmt: skip
            undecided = undecided & (here == 0)

    d = tl.sqrt_rn(best)
    hit = best_slot < _NO_SLOT
    reached = d <= tl.load(radii + best_slot, mask=hit & bounded, other=-_INF)
    hit = hit & tl.where(bounded, reached, hit)
    answer = tl.where(hit, best_slot, -1)
    tl.store(index + b, answer)
    tl.store(distance + b, tl.where(hit, d, _INF))
    if writes & hit:
        _write_rows(
            hidden, hidden_row, hidden_column, values, value_row, value_column,
            first_row, last_row, b, answer, R, V, 1024,
        )  # fmt: skip


_GROUPS = ("group_bounds", "group_places")
scan_kernels = as_laid_out(_scan_kernel, _GROUPS)
answer_kernels = as_laid_out(_answer_kernel, _GROUPS)
