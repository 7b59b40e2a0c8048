"""nearest, lookup and adapt_ in one launch.

    s(x, k) = fp32(sum_i (x_i - k_i)^2) in fp64        d = sqrt(s)        hit iff d* <= radius*

Tiling: a grid of slices of the keys times blocks of queries. A program walks its slice in tiles of
BLOCK_N keys against BLOCK_B queries, BLOCK_D elements at a time.

It does not compute distances but intervals: a coarse fp32 result c and its certified error give
lo <= s <= hi. Few queries: c is the sum of squared differences ("direct", error relative to c).
More: c = |x|^2 + |k|^2 - 2 x.k on tensor cores ("dot", error relative to |x|^2 + |k|^2), with an
accumulator that starts anew every BLOCK_D elements, so that the bound stays small. Almost always
one key of a slice has lo <= the least hi, and is its only candidate. Otherwise the slice computes s
itself. The program that arrives last at the ticket of its query block sees all slices' candidates,
computes s for those that can still win, answers and writes the rows.

Bytes moved: the keys and radii once per query block, of which all but the first should find them in
the L2 cache. Limit: memory bandwidth; for hundreds of queries that cache, then the tensor cores.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

_INF = tl.constexpr(float("inf"))
_LARGEST = tl.constexpr(3.4028234663852886e38)
_NO_SLOT = tl.constexpr(2**62)
_SLICES = tl.constexpr(64)  # partials looked at together
_SMALL = (
    "query_row", "first_row", "last_row", "radii", "count", "index", "distance", "bounds", "slots",
    "tickets",
)  # fmt: skip
_RADII = tl.constexpr(16384)  # are read in the time that a pass over PAIRS keys takes, roughly


@triton.jit
def _fold(sums, WIDTH: tl.constexpr):
    """Add lanes WIDTH.. of [R, 2 WIDTH] to lanes 0..WIDTH."""
    halves = tl.permute(tl.reshape(sums, [sums.shape[0], 2, WIDTH]), [0, 2, 1])
    low, high = tl.split(halves)
    return low + high


@triton.jit
def _add_run(sums, x, k):
    """Add the squares of eight differences in a row [R, 32, 8] to their lanes, one by one."""
    x = tl.reshape(x, [sums.shape[0], 32, 2, 2, 2])
    k = tl.reshape(k, [sums.shape[0], 32, 2, 2, 2])
    x_even, x_odd = tl.split(x)
    k_even, k_odd = tl.split(k)
    x_04, x_26 = tl.split(x_even)
    x_15, x_37 = tl.split(x_odd)
    k_04, k_26 = tl.split(k_even)
    k_15, k_37 = tl.split(k_odd)
    x_0, x_4 = tl.split(x_04)
    x_1, x_5 = tl.split(x_15)
    x_2, x_6 = tl.split(x_26)
    x_3, x_7 = tl.split(x_37)
    k_0, k_4 = tl.split(k_04)
    k_1, k_5 = tl.split(k_15)
    k_2, k_6 = tl.split(k_26)
    k_3, k_7 = tl.split(k_37)
    sums = _add_square(sums, x_0, k_0)
    sums = _add_square(sums, x_1, k_1)
    sums = _add_square(sums, x_2, k_2)
    sums = _add_square(sums, x_3, k_3)
    sums = _add_square(sums, x_4, k_4)
    sums = _add_square(sums, x_5, k_5)
    sums = _add_square(sums, x_6, k_6)
    return _add_square(sums, x_7, k_7)


@triton.jit
def _add_square(sums, x, k):
    difference = x.to(tl.float64) - k.to(tl.float64)
    return sums + difference * difference


@triton.jit
def _squared_distances(query, key, wanted, D, STAGES: tl.constexpr = 3):
    """The canonical s of R pairs of a query and a key, as pointers; NaN counts as +inf."""
    place = (tl.arange(0, 32) * 8)[:, None] + tl.arange(0, 8)[None, :]
    sums = tl.zeros([query.shape[0], 32], tl.float64)
    for start in tl.range(0, D, 256, num_stages=STAGES):
        at = start + place
        inside = wanted[:, None, None] & (at < D)[None, :, :]
        x = tl.load(query[:, None, None] + at[None, :, :], mask=inside, other=0.0)
        k = tl.load(key[:, None, None] + at[None, :, :], mask=inside, other=0.0)
        sums = _add_run(sums, x, k)
    low, high = tl.split(_fold(_fold(_fold(_fold(sums, 16), 8), 4), 2))
    s = (low + high).to(tl.float32)
    return tl.where(s == s, s, _INF)


@triton.jit
def _limit(radius):
    """No key with a larger s lies within `radius`: Lemma 2 of docs/error-bounds.md."""
    return tl.where(radius < 0, -1.0, radius * radius * (1 + 2.0**-21) + 2.0**-140)


@triton.jit
def _largest_radius(radii, slots):
    """The largest of radii[:slots]; a NaN is passed over."""
    largest = tl.full([4096], -_INF, tl.float32)
    for start in range(0, slots, 4096):
        at = start + tl.arange(0, 4096).to(tl.int64)
        radius = tl.load(radii + at, mask=at < slots, other=-_INF)
        largest = tl.where(radius > largest, radius, largest)
    return tl.max(largest, axis=0)


@triton.jit
def _direct_bounds(c, relative, absolute):
    """Bounds of s from sums of squared differences (Lemma 9)."""
    error = c * relative + absolute
    # A NaN is exact: s counts as +inf. An overflow says that s is near the largest fp32 or beyond.
    low = tl.where(c <= _LARGEST, c - error, tl.where(c == c, _LARGEST - _LARGEST * relative, _INF))
    return low, tl.where(c <= _LARGEST, c + error, _INF)


@triton.jit
def _dot_bounds(product, norm, square, relative, absolute):
    """Low bounds [BLOCK_N, BLOCK_B] of s from minus x.k, |k|^2 and |x|^2, and [BLOCK_B] what is to
    be added to any of them for a high bound (Lemma 10).
    """
    size = square[None, :] + norm[:, None]
    low = size + 2.0 * product - (size * relative + absolute)
    # Where something overflowed nothing is known, but that a key with a NaN is at +inf.
    low = tl.where(tl.abs(low) <= _LARGEST, low, -_INF)
    low = tl.where((norm != norm)[:, None] & (square <= _LARGEST)[None, :], _INF, low)
    most = tl.max(tl.where(norm <= _LARGEST, norm, 0.0), axis=0)
    return low, 2.0 * (square + most) * relative + 2.0 * absolute


@triton.jit
def _any(flags, axis: tl.constexpr):
    return tl.max(flags.to(tl.int32), axis=axis) > 0


@triton.jit
def _scan(query, asks, square, keys, key_stride, radii, begin, end, D, relative, absolute,
          DIRECT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
          BLOCK_D: tl.constexpr, GROUPS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Walk the slice. Per group and query: the smallest low bound, its place in the slice, that is,
    its slot counted from `begin`, the second smallest low bound and the smallest high bound, all
    [GROUPS, BLOCK_B]; the largest radius; whether a slot is live.
    """
    BLOCK_B: tl.constexpr = query.shape[0]
    MEMBERS: tl.constexpr = BLOCK_N // GROUPS
    low_1 = tl.full([GROUPS, BLOCK_B], _INF, tl.float32)
    low_2 = tl.full([GROUPS, BLOCK_B], _INF, tl.float32)
    high_1 = tl.full([GROUPS, BLOCK_B], _INF, tl.float32)
    place_1 = tl.full([GROUPS, BLOCK_B], -1, tl.int32)
    largest = tl.full([BLOCK_N], -_INF, tl.float32)
    some_live = tl.zeros([BLOCK_N], tl.int1)
    member = tl.arange(0, MEMBERS)[None, :, None]
    group = tl.arange(0, GROUPS)[:, None] * MEMBERS
    # Sums of squares, or minus x.k and |k|^2, of the tile that is being read.
    coarse = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    norm = tl.zeros([BLOCK_N], tl.float32)
    # One loop over tiles and their chunks, so that loads run ahead from one tile into the next.
    chunks = tl.maximum(tl.cdiv(D, BLOCK_D), 1)
    steps = tl.cdiv((end - begin).to(tl.int32), BLOCK_N) * chunks
    for step in tl.range(0, steps, num_stages=STAGES):
        tile = step // chunks * BLOCK_N
        slot = begin + tile + tl.arange(0, BLOCK_N).to(tl.int64)
        inside = slot < end
        at = step % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
        there = at < D
        key = keys + slot * key_stride
        if DIRECT:
            k = tl.load(
                key[:, None, None] + at[None, None, :],
                mask=inside[:, None, None] & there[None, None, :], other=0.0,
            )  # fmt: skip
            x = tl.load(
                query[None, :, None] + at[None, None, :],
                mask=asks[None, :, None] & there[None, None, :], other=0.0,
            )  # fmt: skip
            difference = k.to(tl.float32) - x.to(tl.float32)
            coarse += tl.sum(difference * difference, axis=2)
        else:
            k = tl.load(
                key[:, None] + at[None, :], mask=inside[:, None] & there[None, :], other=0.0
            )
            x = tl.load(
                query[None, :] + at[:, None], mask=asks[None, :] & there[:, None], other=0.0
            )
            # A subtraction, since Triton would make an addition the accumulator of the product.
            coarse -= tl.dot(k, x, input_precision=PRECISION)
            wide = k.to(tl.float32)
            norm += tl.sum(wide * wide, axis=1)
        if step % chunks == chunks - 1:
            radius = tl.load(radii + slot, mask=inside, other=-_INF)
            live = radius != -_INF
            some_live = some_live | live
            largest = tl.where(radius > largest, radius, largest)  # a NaN is passed over
            if DIRECT:
                least, high = _direct_bounds(coarse, relative, absolute)
                least = tl.where(live[:, None], least, _INF)
                high = tl.where(live[:, None], high, _INF)
                place = group + tl.zeros([GROUPS, BLOCK_B], tl.int32)
            else:
                low, slack = _dot_bounds(coarse, norm, square, relative, absolute)
                low = tl.where(live[:, None], low, _INF)
                low = tl.reshape(low, [GROUPS, MEMBERS, BLOCK_B])
                least = tl.min(low, axis=1)
                who = tl.min(tl.where(low == least[:, None, :], member, MEMBERS), axis=1)
                next_low = tl.min(tl.where(member == who[:, None, :], _INF, low), axis=1)
                low_2 = tl.minimum(low_2, next_low)
                high = tl.where(least > -_INF, least + slack[None, :], _INF)
                place = group + who
            place_1 = tl.where(least < low_1, place + tile, place_1)
            low_2 = tl.minimum(low_2, tl.maximum(low_1, least))
            low_1 = tl.minimum(low_1, least)
            high_1 = tl.minimum(high_1, high)
            coarse = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
            norm = tl.zeros([BLOCK_N], tl.float32)
    return low_1, place_1, low_2, high_1, tl.max(largest, axis=0), _any(some_live, 0)


@triton.jit
def _resolve(low_1, place_1, low_2, high_1, some_live, source, source_stride, asked, asks,
             keys, key_stride, radii, begin, end, n, D, bounded,
             BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    """Return the slice's candidate of each query: bounds of its s and its slot (-1: none).

    All keys whose low bound is at most the least high bound are candidates. Where they are several,
    s decides here, and both bounds are s.
    """
    GROUPS: tl.constexpr = low_1.shape[0]
    MEMBERS: tl.constexpr = BLOCK_N // GROUPS
    column = tl.arange(0, BLOCK_B)[None, :]
    group = tl.arange(0, GROUPS)[:, None]
    high = tl.min(high_1, axis=0)
    low = tl.min(low_1, axis=0)
    # Groups with more candidates than they know: all, where nothing is known or everything is far.
    crowded = low_2 <= high[None, :]
    candidate = ((place_1 >= 0) & (low_1 <= high[None, :])) | crowded
    slot = begin + tl.max(tl.where(candidate, place_1, -1), axis=0)
    slot = tl.where(asks & some_live & _any(candidate, 0), slot, -1)
    several = _any(crowded, 0) | (tl.sum(candidate.to(tl.int32), axis=0) > 1)
    unresolved = asks & some_live & several
    if _any(unresolved, None):
        candidate = candidate & unresolved[None, :]
        members = tl.cdiv(end - begin, BLOCK_N) * MEMBERS
        passes = tl.sum(tl.where(candidate, tl.where(crowded, members // PAIRS + 1, 1), 0))
        # Beyond the largest radius nothing matters, if finding it is worth the while.
        if bounded & (passes * _RADII > n):
            limit = _limit(_largest_radius(radii, n))
            slot = tl.where(unresolved, -1, slot)
            unresolved = unresolved & (low <= limit)
            candidate = candidate & unresolved[None, :] & (low_1 <= limit)
            crowded = crowded & (low_2 <= limit)
        low = tl.where(unresolved, _INF, low)
        slot = tl.where(unresolved, _NO_SLOT, slot)
        while _any(candidate, None):
            # One query, one of its groups: the slot it knows, or all its slots.
            one = tl.min(tl.where(candidate, column * GROUPS + group, GROUPS * BLOCK_B))
            here = column * GROUPS + group == one
            whose = tl.arange(0, BLOCK_B) == one // GROUPS
            query = source + tl.sum(tl.where(whose, asked, 0), axis=0) * source_stride
            query = query + tl.zeros([PAIRS], tl.int64)
            known = begin + tl.max(tl.where(here, place_1, -1))
            every = _any(here & crowded, None)
            scored = tl.where(every, members, 1)
            for start in range(0, scored, PAIRS):
                at = start + tl.arange(0, PAIRS).to(tl.int64)
                at_slot = begin + at // MEMBERS * BLOCK_N + one % GROUPS * MEMBERS + at % MEMBERS
                at_slot = tl.where(every, at_slot, known)
                wanted = (at < scored) & (at_slot < end)
                wanted = wanted & (tl.load(radii + at_slot, mask=wanted, other=-_INF) != -_INF)
                s = _squared_distances(query, keys + at_slot * key_stride, wanted, D)
                s_least = tl.min(tl.where(wanted, s, _INF), axis=0)
                s_slot = tl.min(tl.where(wanted & (s == s_least), at_slot, _NO_SLOT), axis=0)
                nearer = whose & ((s_least < low) | ((s_least == low) & (s_slot < slot)))
                low = tl.where(nearer, s_least, low)
                slot = tl.where(nearer, s_slot, slot)
            candidate = candidate & (here == 0)
        high = tl.where(unresolved, low, high)
        slot = tl.where(slot == _NO_SLOT, -1, slot)
    return low, high, slot


@triton.jit
def _partials(slots, lows, highs, b, B, start, slices):
    """Candidates [BLOCK_B, _SLICES] of the slices from `start` on, as other programs left them."""
    at = start + tl.arange(0, _SLICES)
    there = (b < B)[:, None] & (at < slices)[None, :]
    at = b[:, None] * slices + at[None, :]
    slot = tl.load(slots + at, mask=there, other=-1, cache_modifier=".cg")
    low = tl.load(lows + at, mask=there, other=_INF, cache_modifier=".cg")
    high = tl.load(highs + at, mask=there, other=_INF, cache_modifier=".cg")
    return slot, low, high


@triton.jit
def _decide(slots, lows, highs, largest, b, B, slices, query, keys, key_stride, radii, D,
            bounded):  # fmt: skip
    """Return the slot that answers each query, or -1, and the distance."""
    bound = tl.full([b.shape[0]], _INF, tl.float32)
    radius = tl.full([_SLICES], -_INF, tl.float32)
    for start in range(0, slices, _SLICES):
        slot, _low, high = _partials(slots, lows, highs, b, B, start, slices)
        bound = tl.minimum(bound, tl.min(tl.where(slot >= 0, high, _INF), axis=1))
        at = start + tl.arange(0, _SLICES)
        radius = tl.maximum(
            radius, tl.load(largest + at, mask=at < slices, other=-_INF, cache_modifier=".cg")
        )
    bound = tl.minimum(bound, tl.where(bounded, _limit(tl.max(radius, axis=0)), _INF))

    best = tl.full([b.shape[0]], _INF, tl.float32)
    best_slot = tl.full([b.shape[0]], _NO_SLOT, tl.int64)
    place = tl.arange(0, _SLICES)[None, :]
    for start in range(0, slices, _SLICES):
        slot, low, high = _partials(slots, lows, highs, b, B, start, slices)
        contender = (slot >= 0) & (low <= bound[:, None])
        # Each query's next contender at a time; most queries have one in all.
        while _any(contender, None):
            first = tl.min(tl.where(contender, place, _SLICES), axis=1)
            here = place == first[:, None]
            one = tl.sum(tl.where(here, slot, 0), axis=1)
            s = tl.min(tl.where(here, low, _INF), axis=1)
            some = first < _SLICES
            known = s == tl.min(tl.where(here, high, _INF), axis=1)
            computed = _squared_distances(query, keys + one * key_stride, some & (known == 0), D)
            s = tl.where(known, s, computed)
            nearer = some & ((s < best) | ((s == best) & (one < best_slot)))
            best = tl.where(nearer, s, best)
            best_slot = tl.where(nearer, one, best_slot)
            contender = contender & (place != first[:, None])
    d = tl.sqrt_rn(best)
    hit = best_slot < _NO_SLOT
    reached = d <= tl.load(radii + best_slot, mask=hit & bounded, other=-_INF)
    hit = hit & tl.where(bounded, reached, hit)
    return tl.where(hit, best_slot, -1), tl.where(hit, d, _INF)


@triton.jit
def _how(HOW):
    """Return whether radii decide, whether there is a count, and whether rows are written."""
    return HOW % 2 == 1, HOW // 2 % 2 == 1, HOW // 4 == 1


@triton.jit
def _used(count, counted, C):
    """Return how many slots are in use."""
    n = C.to(tl.int64)  # the interpreter takes it for an int32
    return tl.minimum(tl.maximum(tl.load(count, mask=counted, other=n), 0), n)


@triton.jit
def _slice(n, slice_id, slices):
    """Return where a slice begins and ends."""
    per_slice = tl.cdiv(n, slices)
    begin = tl.minimum(slice_id * per_slice, n)
    return begin, tl.minimum(begin + per_slice, n)


@triton.jit
def _query(query, asks, D):
    """Return which queries are to be answered, those without a NaN, and |x|^2."""
    square = tl.zeros([query.shape[0]], tl.float32)  # a NaN exactly if the query holds one
    for start in range(0, D, 128):
        at = start + tl.arange(0, 128)
        x = tl.load(query[:, None] + at[None, :], mask=asks[:, None] & (at < D)[None, :], other=0.0)
        square += tl.sum(x.to(tl.float32) * x.to(tl.float32), axis=1)
    return asks & (square == square), square


@triton.jit
def _asked(query_row, writes, b, B, S):
    """Return which of the queries `b` are asked, and the row of the source that asks."""
    row = tl.where(writes, tl.load(query_row + b, mask=(b < B) & writes, other=-1), b)
    asks = (b < B) & (row >= 0) & (row < S)
    return asks, tl.where(asks, row, 0)


@triton.jit
def _write_rows(hidden, hidden_row, hidden_column, values, value_row, value_column,
                first_row, last_row, b, slot, R, V, BLOCK_V: tl.constexpr):  # fmt: skip
    """Write values[slot] into the rows of `hidden` that query b answers for."""
    first = tl.maximum(tl.load(first_row + b), 0)
    last = tl.minimum(tl.load(last_row + b), R)
    for start in range(0, V, BLOCK_V):
        at = (start + tl.arange(0, BLOCK_V)).to(tl.int64)
        value = tl.load(values + slot * value_row + at * value_column, mask=at < V)
        for row in range(first, last):
            tl.store(hidden + row * hidden_row + at * hidden_column, value, mask=at < V)


@triton.jit
def _keep(bounds, slots, low, high, slot, radius, slice_id, block, slices, b, B):
    """Leave the slice's candidates and its largest radius for the last program of the block."""
    lows, highs = bounds, bounds + B * slices
    largest = highs + B * slices + block * slices
    at = b * slices + slice_id
    tl.store(lows + at, low, mask=b < B)
    tl.store(highs + at, high, mask=b < B)
    tl.store(slots + at, slot, mask=b < B)
    tl.store(largest + slice_id, radius)


@triton.jit
def _last_to_arrive(tickets, block, slices):
    """Say whether all programs of this block of queries have left their candidates."""
    tl.debug_barrier()
    return tl.atomic_add(tickets + block, 1, sem="acq_rel") == slices - 1


@triton.jit
def _answer(source, source_stride, query_row, keys, key_stride, radii, index, distance, bounds,
            slots, tickets, hidden, hidden_row, hidden_column, first_row, last_row,
            values, value_row, value_column, block, slices, B, S, R, D, V, bounded, writes,
            BLOCK_B: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    """Answer a block of queries from what all programs left, and write the rows."""
    lows, highs = bounds, bounds + B * slices
    largest = highs + B * slices + block * slices
    tl.store(tickets + block, 0)  # everyone has arrived: ready for the next launch
    stop = tl.minimum((block + 1) * BLOCK_B, B)
    for part in range(block * BLOCK_B, stop, PAIRS):
        some = part + tl.arange(0, PAIRS).to(tl.int64)
        _asks, row_asked = _asked(query_row, writes, some, stop, S)
        answer, d = _decide(
            slots, lows, highs, largest, some, stop, slices, source + row_asked * source_stride,
            keys, key_stride, radii, D, bounded,
        )  # fmt: skip
        tl.store(index + some, answer, mask=some < stop)
        tl.store(distance + some, d, mask=some < stop)
    if writes:
        # `hidden` may be `source`: by now all of it that matters has been read.
        tl.debug_barrier()
        for one in range(block * BLOCK_B, stop):
            slot = tl.load(index + one)
            if slot >= 0:
                _write_rows(
                    hidden, hidden_row, hidden_column, values, value_row, value_column,
                    first_row, last_row, one, slot, R, V, 1024,
                )  # fmt: skip


def as_laid_out(kernel: Any, never: Sequence[str]) -> tuple[Any, Any, Any]:
    """Return three kernels made of one function, each of which is compiled once for all calls.

    What changes from call to call must not make for another compilation: sizes, whether a small
    tensor (`never` names these) starts at a multiple of 16 bytes, whether there is something to
    write. Triton compiles anew for each number that is 1 or becomes a multiple of 16, and for each
    such address. Here it may look at what all calls of a kernel have in common.

    Returns:
        The kernel for calls where rows of keys and queries start at multiples of 16 bytes and
        elements and so do rows of values and outputs, whose elements are side by side; the kernel
        where that is so of keys and queries; the kernel for any layout. See `lookup.layout_of`.
    """
    sizes = ["B", "S", "R", "C", "HOW", "slices", "sketch_slots"]
    written = ["hidden_row", "hidden_column", "value_row", "value_column", "V"]
    read = ["source_stride", "key_stride", "D"]
    tensors = [["hidden", "values"], ["source", "keys"]]
    never = [*_SMALL, *never]
    return (
        triton.jit(kernel, do_not_specialize=sizes, do_not_specialize_on_alignment=never),
        triton.jit(
            kernel,
            do_not_specialize=sizes + written,
            do_not_specialize_on_alignment=never + tensors[0],
        ),
        triton.jit(
            kernel,
            do_not_specialize=sizes + written + read,
            do_not_specialize_on_alignment=never + tensors[0] + tensors[1],
        ),
    )


def _lookup_kernel(
    source, source_stride, query_row,  # [S, D]; [B]
    keys, key_stride, radii, count,  # [C, D], [C]
    index, distance,  # [B]
    bounds, slots, tickets,  # workspace: fp32 [2 B + blocks, slices], int64 [B, slices]; zeros
    hidden, hidden_row, hidden_column, first_row, last_row,  # [R, V], [B]
    values, value_row, value_column,  # [C, V]
    B: tl.int64, S: tl.int64, R: tl.int64, C: tl.int64, D, V,
    HOW,  # 1: radii decide, 2: there is a count, 4: rows are asked for and written; sums of these.
    # What there is not is never read, whatever its pointer
    relative, absolute,  # the error of a coarse result, see tiles.error_bound
    DIRECT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUPS: tl.constexpr,
    PAIRS: tl.constexpr,  # whose s is computed together
    STAGES: tl.constexpr,  # key tiles in flight
):  # fmt: skip
    slice_id, block = tl.program_id(0), tl.program_id(1)
    slices = tl.num_programs(0)
    bounded, counted, writes = _how(HOW)
    n = _used(count, counted, C)
    begin, end = _slice(n, slice_id, slices)
    b = block.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    asks, asked = _asked(query_row, writes, b, B, S)
    query = source + asked * source_stride
    asks, square = _query(query, asks, D)
    end = tl.where(_any(asks, 0), end, begin)  # nothing to scan for

    low_1, place_1, low_2, high_1, radius, some_live = _scan(
        query, asks, square, keys, key_stride, radii, begin, end, D, relative, absolute,
        DIRECT, PRECISION, BLOCK_N, BLOCK_D, GROUPS, STAGES,
    )  # fmt: skip
    low, high, slot = _resolve(
        low_1, place_1, low_2, high_1, some_live, source, source_stride, asked, asks,
        keys, key_stride, radii, begin, end, n, D, bounded, BLOCK_B, BLOCK_N, PAIRS,
    )  # fmt: skip

    _keep(bounds, slots, low, high, slot, radius, slice_id, block, slices, b, B)
    if _last_to_arrive(tickets, block, slices):
        _answer(
            source, source_stride, query_row, keys, key_stride, radii, index, distance, bounds,
            slots, tickets, hidden, hidden_row, hidden_column, first_row, last_row,
            values, value_row, value_column, block, slices, B, S, R, D, V, bounded, writes,
            BLOCK_B, PAIRS,
        )  # fmt: skip


lookup_kernels = as_laid_out(_lookup_kernel, ())
