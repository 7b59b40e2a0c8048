"""pruned_lookup and pruned_adapt_ in one launch: lookup_kernel.py, but few keys are read.

    key n is out of reach of x  if  |phi(x) - stored_n| > T (1 + 2^-21) + 2^-73 + e_x + e_n

The mathematics is in grace_kernels/sketch_math.py; e_x bounds the rounding of phi(x), see
`tiles.sketch_bound`. T is `radius_bound`, unless an entry with a larger radius is truly hit: then
whatever is at most as far as that one is within T too.

Tiling: slices times blocks of queries as without a sketch, slices cut at multiples of 32 slots. A
program sketches its queries, walks the ten head codes of each of its slots, SCAN_N slots at a time,
lists the survivors, pairs of a slot and a query that may be within reach, strikes off that list
those that all 65 numbers rule out, and scores the others: its candidate is resolved. Where a slot
is not covered, a query cannot be sketched or the list is too long, the slice is scanned as without
a sketch.

Bytes moved: 10 per slot and block of queries and 66 for a survivor, beside 64 directions
that every program reads from the L2 cache. Limit: that cache for wide keys, then memory bandwidth.
"""

import triton
import triton.language as tl

from .. import sketch_layout as layout
from .lookup_kernel import (
    _INF,
    _NO_SLOT,
    _answer,
    _any,
    _asked,
    _how,
    _keep,
    _last_to_arrive,
    _resolve,
    _scan,
    _squared_distances,
    _used,
    as_laid_out,
)

_DIRECTIONS = tl.constexpr(layout.DIRECTIONS)
_HEAD = tl.constexpr(layout.HEAD)
_HEAD_NUMBERS = tl.constexpr(layout.HEAD_NUMBERS)
_TAIL_NUMBERS = tl.constexpr(layout.TAIL_NUMBERS)
_BLOCK = tl.constexpr(layout.BLOCK)
_HEAD_BYTES = tl.constexpr(layout.HEAD_NUMBERS * layout.BLOCK)  # of a block
_TAIL_BYTES = tl.constexpr(layout.TAIL_NUMBERS * layout.BLOCK)
_RESIDUAL = tl.constexpr(layout.RESIDUAL)
_ERROR = tl.constexpr(layout.ERROR)
_COORDINATES = tl.constexpr(layout.COORDINATES)
_MIDDLE = tl.constexpr(layout.MIDDLE)
_UNKNOWN = tl.constexpr(layout.UNKNOWN)
_OUTLIERS = tl.constexpr(layout.OUTLIERS)

QUERY_FLOATS = layout.DIRECTIONS + 8  # of a query in the workspace: coordinates, then these
_QUERY_FLOATS = tl.constexpr(QUERY_FLOATS)
_RESIDUAL_LOW = tl.constexpr(layout.DIRECTIONS)
_RESIDUAL_HIGH = tl.constexpr(layout.DIRECTIONS + 1)
_QUERY_ERROR = tl.constexpr(layout.DIRECTIONS + 2)
_REACH = tl.constexpr(layout.DIRECTIONS + 3)
_FEW = tl.constexpr(32)  # pairs, and 4 per query, that are always scored rather than scanned


@triton.jit
def _coordinates(query, asks, centre, directions, wanted, D, DIRECT: tl.constexpr,
                 BLOCK_E: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Return P y [64, BLOCK_B], |y|^2 and |x|^2 [BLOCK_B] of y = x - c; no P y unless `wanted`."""
    BLOCK_B: tl.constexpr = query.shape[0]
    j = tl.arange(0, _DIRECTIONS)[:, None]
    if DIRECT:
        coordinates = tl.zeros([_DIRECTIONS, BLOCK_B, BLOCK_E], tl.float32)
        norm = tl.zeros([BLOCK_B, BLOCK_E], tl.float32)
        square = tl.zeros([BLOCK_B, BLOCK_E], tl.float32)
    else:
        coordinates = tl.zeros([_DIRECTIONS, BLOCK_B], tl.float32)
        norm = tl.zeros([BLOCK_E, BLOCK_B], tl.float32)
        square = tl.zeros([BLOCK_E, BLOCK_B], tl.float32)
    for start in tl.range(0, D, BLOCK_E, num_stages=STAGES):
        at = start + tl.arange(0, BLOCK_E)
        there = at < D
        c = tl.load(centre + at, mask=there, other=0.0)
        p = tl.load(directions + j * D + at[None, :], mask=there[None, :] & wanted, other=0.0)
        if DIRECT:
            x = tl.load(
                query[:, None] + at[None, :], mask=asks[:, None] & there[None, :], other=0.0
            ).to(tl.float32)
            y = x - c[None, :]
            coordinates += p.to(tl.float32)[:, None, :] * y[None, :, :]
        else:
            x = tl.load(
                query[None, :] + at[:, None], mask=asks[None, :] & there[:, None], other=0.0
            ).to(tl.float32)
            y = x - c[:, None]
            high = y.to(tl.bfloat16)
            low = (y - high.to(tl.float32)).to(tl.bfloat16)
            # Subtractions, since Triton would make an addition the accumulator of the product.
            coordinates -= tl.dot(p, high)
            coordinates -= tl.dot(p, low)
        norm += y * y
        square += x * x
    across: tl.constexpr = 1 if DIRECT else 0
    coordinates = tl.sum(coordinates, axis=2) if DIRECT else -coordinates
    return coordinates, tl.sum(norm, axis=across), tl.sum(square, axis=across)


@triton.jit
def _residual(coordinates, norm, middle, norm_error, spread):
    """Return [BLOCK_B] bounds of the residual, less `middle`, of the error of all coordinates
    together, and whether these numbers mean something: Lemma 19 of docs/error-bounds.md.
    """
    coordinates_square = tl.sum(coordinates * coordinates, axis=0)
    size = tl.sqrt_rn(norm) * (1 + norm_error + 2.0**-20) + 2.0**-60
    error = size * spread + 2.0**-60
    square = norm - coordinates_square
    square_error = (
        1.02 * (size * size * (norm_error + 2.0**-17) + error * (2.1 * size + error)) + 2.0**-110
    )
    low = tl.sqrt_rn(tl.maximum(square - square_error, 0.0)) * (1 - 2.0**-20)
    high = tl.sqrt_rn(tl.maximum(square, 0.0) + square_error) * (1 + 2.0**-20)
    far = tl.abs(middle)
    low = low - middle - 2.0**-22 * (low + far)
    high = high - middle + 2.0**-22 * (high + far)
    known = (norm < _INF) & (coordinates_square < _INF) & (square_error < _INF) & (error < _INF)
    return low, high, error, known & (low > -_INF) & (high < _INF)


@triton.jit
def _gap_of_residual(low, high, residual):
    gap = tl.maximum(tl.maximum(low - residual, residual - high), 0.0)
    return gap * gap


@triton.jit
def _error_of(code, scale):
    return tl.where(code == _UNKNOWN, _INF, code.to(tl.float32) * scale)


@triton.jit
def _out_of_reach(gap, reach, error):
    """Tell which keys are certainly out of reach; `gap` is |phi(x) - stored|^2 or any part of it
    (Lemma 16). A NaN or an overflow on the right keeps the key.
    """
    t = reach * (1 + 2.0**-21) + 2.0**-73 + error
    return gap > t * t * (1 + 2.0**-16) + 2.0**-120


@triton.jit
def _head_of_query(scratch, BLOCK_B: tl.constexpr):
    """Return the first 8 coordinates of the queries, [BLOCK_B] each."""
    coordinates = ()
    for j in tl.static_range(_HEAD):
        at = scratch + tl.arange(0, BLOCK_B) * _QUERY_FLOATS
        coordinates = coordinates + (tl.load(at + j),)
    return coordinates


@triton.jit
def _head_scales(scales):
    """Return the scales of residual, error and the first 8 coordinates."""
    first = ()
    for j in tl.static_range(_HEAD_NUMBERS):
        first = first + (tl.load(scales + j),)
    return first


@triton.jit
def _head_gaps(codes, there, x, low, high, scale):
    """Return a lower bound [K, BLOCK_B] of |phi(x) - stored|^2, and the errors of the keys [K];
    `codes` are those of the residual.
    """
    residual = tl.load(codes + _RESIDUAL * _BLOCK, mask=there, other=0).to(tl.float32)
    residual = residual * scale[_RESIDUAL]
    error = _error_of(tl.load(codes + _ERROR * _BLOCK, mask=there, other=0), scale[_ERROR])
    gap = _gap_of_residual(low[None, :], high[None, :], residual[:, None])
    for j in tl.static_range(_HEAD):
        code = tl.load(codes + (_COORDINATES + j) * _BLOCK, mask=there, other=0).to(tl.float32)
        difference = x[j][None, :] - (code * scale[_COORDINATES + j])[:, None]
        gap += difference * difference
    return gap, error


@triton.jit
def _append(survivors, found, first, keep, ROOM: tl.constexpr):
    """List the pairs that are kept, places counted from `first` on; return how many survivors there
    are then, ROOM + 1 for too many.
    """
    K: tl.constexpr = keep.shape[0]
    BLOCK_B: tl.constexpr = keep.shape[1]
    pair = (first + tl.arange(0, K)[:, None]) * BLOCK_B + tl.arange(0, BLOCK_B)[None, :]
    kept = tl.reshape(keep.to(tl.int32), [K * BLOCK_B])
    at = found + tl.cumsum(kept, axis=0) - kept
    tl.store(survivors + at, tl.reshape(pair, [K * BLOCK_B]), mask=(kept > 0) & (at < ROOM))
    return tl.minimum(found + tl.sum(kept, axis=0), ROOM + 1)


@triton.jit
def _pairs_at(survivors, at, there, begin, outliers, OWN: tl.constexpr, BLOCK_B: tl.constexpr):
    """Return some of the survivors, their slots and their queries' places."""
    pair = tl.load(survivors + at, mask=there, other=0)
    if OWN:
        slot = tl.load(outliers + pair // BLOCK_B, mask=there, other=0)
    else:
        slot = begin + pair // BLOCK_B
    return pair, slot, pair % BLOCK_B


@triton.jit
def _filter(survivors, found, begin, outliers, scratch, head, tail, scales, radii,
            OWN: tl.constexpr, BLOCK_B: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Strike off the list what all 65 numbers put out of reach (OWN: of the slot's own radius);
    return how many survivors are left.
    """
    first = tl.arange(0, _HEAD)[None, :]
    later = tl.arange(0, _DIRECTIONS)[None, :]
    first_scale = tl.load(scales + _COORDINATES + first)
    later_scale = tl.load(scales + _HEAD_NUMBERS + later, mask=later < _TAIL_NUMBERS, other=0.0)
    residual_scale, error_scale = tl.load(scales + _RESIDUAL), tl.load(scales + _ERROR)
    left = 0
    tl.debug_barrier()  # the list is in memory
    for start in range(0, found, CHUNK):
        at = start + tl.arange(0, CHUNK)
        there = at < found
        pair, slot, q = _pairs_at(survivors, at, there, begin, outliers, OWN, BLOCK_B)
        query = scratch + q * _QUERY_FLOATS
        front = head + slot // _BLOCK * _HEAD_BYTES + slot % _BLOCK
        back = tail + slot // _BLOCK * _TAIL_BYTES + slot % _BLOCK
        some = there[:, None] & (later < _TAIL_NUMBERS)
        x = tl.load(query[:, None] + first, mask=there[:, None], other=0.0)
        code = tl.load(
            front[:, None] + (_COORDINATES + first) * _BLOCK, mask=there[:, None], other=0
        )
        near = x - code.to(tl.float32) * first_scale
        x = tl.load(query[:, None] + _HEAD + later, mask=some, other=0.0)
        code = tl.load(back[:, None] + later * _BLOCK, mask=some, other=0)
        far = x - code.to(tl.float32) * later_scale
        code = tl.load(front + _RESIDUAL * _BLOCK, mask=there, other=0)
        residual = code.to(tl.float32) * residual_scale
        key_error = _error_of(tl.load(front + _ERROR * _BLOCK, mask=there, other=0), error_scale)
        low = tl.load(query + _RESIDUAL_LOW, mask=there, other=0.0)
        high = tl.load(query + _RESIDUAL_HIGH, mask=there, other=0.0)
        error = tl.load(query + _QUERY_ERROR, mask=there, other=0.0)
        if OWN:
            reach = tl.load(radii + slot, mask=there, other=0.0)
        else:
            reach = tl.load(query + _REACH, mask=there, other=0.0)
        gap = _gap_of_residual(low, high, residual) + tl.sum(near * near, axis=1)
        gap += tl.sum(far * far, axis=1)
        keep = there & (_out_of_reach(gap, reach, error + key_error) == 0)
        kept = keep.to(tl.int32)
        place = left + tl.cumsum(kept, axis=0) - kept
        tl.debug_barrier()  # everyone has read this chunk
        tl.store(survivors + place, pair, mask=keep)
        left += tl.sum(kept, axis=0)
    tl.debug_barrier()
    return left


@triton.jit
def _score(survivors, found, begin, outliers, source, source_stride, query_row, writes,
           first_query, B, S, keys, key_stride, radii, D, OWN: tl.constexpr, BLOCK_B: tl.constexpr,
           PAIRS: tl.constexpr):  # fmt: skip
    """Return s and slot of each query's nearest survivor (OWN: of those that cover the query)."""
    best = tl.full([BLOCK_B], _INF, tl.float32)
    best_slot = tl.full([BLOCK_B], _NO_SLOT, tl.int64)
    for start in range(0, found, PAIRS):
        at = start + tl.arange(0, PAIRS)
        wanted = at < found
        _pair, slot, q = _pairs_at(survivors, at, wanted, begin, outliers, OWN, BLOCK_B)
        _asks, asked = _asked(query_row, writes, first_query + q, B, S)
        s = _squared_distances(source + asked * source_stride, keys + slot * key_stride, wanted, D)
        if OWN:
            wanted = wanted & (tl.sqrt_rn(s) <= tl.load(radii + slot, mask=wanted, other=-_INF))
        mine = wanted[:, None] & (q[:, None] == tl.arange(0, BLOCK_B)[None, :])
        least = tl.min(tl.where(mine, s[:, None], _INF), axis=0)
        lowest = tl.min(
            tl.where(mine & (s[:, None] == least[None, :]), slot[:, None], _NO_SLOT), axis=0
        )
        nearer = (least < best) | ((least == best) & (lowest < best_slot))
        best = tl.where(nearer, least, best)
        best_slot = tl.where(nearer, lowest, best_slot)
    return best, best_slot


@triton.jit
def _reach(asks, wanted, x, low, high, error, scale, affordable, source, source_stride, query_row,
           writes, first_query, B, S, keys, key_stride, radii, scales, head, tail, radius_bound,
           outliers, scratch, survivors, n, m, D, BLOCK_B: tl.constexpr, PAIRS: tl.constexpr,
           ROOM: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Return T [BLOCK_B], within which lies every key that matters to a query (Lemma 20), and a
    bound of all radii.

    A hit is the nearest key. If its radius is at most the bound, so are its distance and that of
    any key as near. If not it is one of the outliers, and then at most as far as the nearest
    outlier that covers the query.
    """
    bound = tl.load(radius_bound)
    slot = tl.load(outliers + tl.arange(0, _OUTLIERS))
    live = (slot >= 0) & (slot < n)
    radius = tl.load(radii + slot, mask=live, other=-_INF)
    live = live & (radius > bound)
    largest = tl.maximum(bound, tl.max(tl.where(live, radius, -_INF), axis=0))
    inside = live & (slot < m) & (radius >= 0) & wanted
    uncovered = tl.max(tl.where(live & (slot >= m), radius, -_INF), axis=0)
    reach = tl.maximum(tl.full([BLOCK_B], -_INF, tl.float32), tl.maximum(bound, uncovered))
    if _any(inside, 0) & _any(asks, 0):
        front = head + slot // _BLOCK * _HEAD_BYTES + slot % _BLOCK
        gap, key_error = _head_gaps(front, inside, x, low, high, scale)
        out = _out_of_reach(gap, radius[:, None], error[None, :] + key_error[:, None])
        keep = inside[:, None] & asks[None, :] & (out == 0)
        found = _append(survivors, 0, 0, keep, ROOM)
        found = _filter(
            survivors, found, n, outliers, scratch, head, tail, scales, radii, True, BLOCK_B, CHUNK
        )
        if found > affordable:
            reach = tl.maximum(reach, largest)
        else:
            s, hit = _score(
                survivors, found, n, outliers, source, source_stride, query_row, writes,
                first_query, B, S, keys, key_stride, radii, D, True, BLOCK_B, PAIRS,
            )  # fmt: skip
            reach = tl.where(hit < _NO_SLOT, tl.maximum(reach, tl.sqrt_rn(s)), reach)
        tl.debug_barrier()  # before the list is written anew
    return reach, largest


@triton.jit
def _search(coordinates, norm, asks, wanted, source, source_stride, query_row, writes,
            first_query, B, S, keys, key_stride, radii, scales, head, tail, radius_bound, outliers,
            scratch, survivors, begin, end, n, m, D, norm_error, spread, BLOCK_B: tl.constexpr,
            PAIRS: tl.constexpr, ROOM: tl.constexpr, CHUNK: tl.constexpr, SCAN_N: tl.constexpr,
            STAGES: tl.constexpr):  # fmt: skip
    """Look for each query's candidate among slots begin..end-1, all of them covered.

    Return s and slot of the nearest key within reach, how many pairs were scored, a bound of all
    radii, and whether the slice has to be scanned instead.
    """
    low, high, error, known = _residual(
        coordinates, norm, tl.load(scales + _MIDDLE), norm_error, spread
    )
    fails = _any(asks & (known == 0), 0)
    asks = asks & known
    at = scratch + tl.arange(0, BLOCK_B) * _QUERY_FLOATS
    tl.store(at[None, :] + tl.arange(0, _DIRECTIONS)[:, None], coordinates)
    tl.store(at + _RESIDUAL_LOW, low)
    tl.store(at + _RESIDUAL_HIGH, high)
    tl.store(at + _QUERY_ERROR, error)
    tl.debug_barrier()
    x = _head_of_query(scratch, BLOCK_B)
    scale = _head_scales(scales)
    # Beyond that, a scan costs no more.
    affordable = tl.maximum((end - begin) // 4, _FEW + 4 * BLOCK_B)

    reach, largest = _reach(
        asks, wanted & (fails == 0), x, low, high, error, scale, affordable, source, source_stride,
        query_row, writes, first_query, B, S, keys, key_stride, radii, scales, head, tail,
        radius_bound, outliers, scratch, survivors, n, m, D, BLOCK_B, PAIRS, ROOM, CHUNK,
    )  # fmt: skip
    tl.store(at + _REACH, reach)

    # Whether a slot is dead is looked up only where its codes are near: hardly ever.
    asks = asks & (reach >= 0)
    runs = wanted & (fails == 0) & _any(asks, 0)
    slots = tl.where(runs, end - begin, 0).to(tl.int32)
    codes = head + begin // _BLOCK * _HEAD_BYTES
    place = tl.arange(0, SCAN_N)
    blocks = tl.cdiv(slots, _BLOCK)
    found = 0
    for step in tl.range(0, tl.cdiv(slots, SCAN_N), num_stages=STAGES):
        nth = step * (SCAN_N // _BLOCK) + place // _BLOCK
        front = codes + nth.to(tl.int64) * _HEAD_BYTES + place % _BLOCK
        gap, key_error = _head_gaps(front, nth < blocks, x, low, high, scale)
        out = _out_of_reach(gap, reach[None, :], error[None, :] + key_error[:, None])
        in_slice = step * SCAN_N + place < slots
        keep = in_slice[:, None] & asks[None, :] & (out == 0)
        if _any(keep, None) & (found <= ROOM):
            slot = begin + step * SCAN_N + place
            radius = tl.load(radii + slot, mask=_any(keep, 1), other=-_INF)
            keep = keep & (radius != -_INF)[:, None]
            found = _append(survivors, found, step * SCAN_N, keep, ROOM)
    overflow = found > ROOM
    found = tl.where(overflow, 0, found)
    left = _filter(
        survivors, found, begin, outliers, scratch, head, tail, scales, radii, False, BLOCK_B, CHUNK
    )
    overflow = overflow | (left > affordable)
    left = tl.where(overflow, 0, left)
    best, best_slot = _score(
        survivors, left, begin, outliers, source, source_stride, query_row, writes,
        first_query, B, S, keys, key_stride, radii, D, False, BLOCK_B, PAIRS,
    )  # fmt: skip
    return best, best_slot, left, largest, fails | overflow


def _pruned_kernel(
    source, source_stride, query_row,  # as lookup_kernel, up to `absolute`
    keys, key_stride, radii, count,
    index, distance,
    bounds, slots, tickets,
    hidden, hidden_row, hidden_column, first_row, last_row,
    values, value_row, value_column,
    B: tl.int64, S: tl.int64, R: tl.int64, C: tl.int64, D, V,
    HOW, relative, absolute,
    centre, directions, scales, head, tail, covered, radius_bound, outliers, counters,
    scratch, survivors,  # workspace of each program: fp32 [BLOCK_B, QUERY_FLOATS], int32 [ROOM]
    sketch_slots: tl.int64,  # that head and tail have memory for
    norm_error, spread,  # of a query's sketch, see tiles.sketch_bound
    DIRECT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUPS: tl.constexpr,
    PAIRS: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_E: tl.constexpr,  # elements of a query sketched at a time
    SCAN_N: tl.constexpr, SCAN_STAGES: tl.constexpr,  # slots whose head is read at a time
    ROOM: tl.constexpr, CHUNK: tl.constexpr,  # for survivors, and how many are looked at together
):  # fmt: skip
    slice_id, block = tl.program_id(0), tl.program_id(1)
    slices = tl.num_programs(0)
    bounded, counted, writes = _how(HOW)
    n = _used(count, counted, C)
    m = tl.minimum(tl.maximum(tl.load(covered), 0), tl.minimum(n, sketch_slots.to(tl.int64)))
    per_slice = tl.cdiv(tl.cdiv(n, slices), _BLOCK) * _BLOCK
    begin = tl.minimum(slice_id * per_slice, n)
    end = tl.minimum(begin + per_slice, n)
    program = (block * slices + slice_id).to(tl.int64)
    scratch += program * (BLOCK_B * _QUERY_FLOATS)
    survivors += program * ROOM

    first_query = block.to(tl.int64) * BLOCK_B
    b = first_query + tl.arange(0, BLOCK_B)
    asks, asked = _asked(query_row, writes, b, B, S)
    query = source + asked * source_stride
    wanted = (begin < end) & (end <= m)
    coordinates, norm, square = _coordinates(
        query, asks, centre, directions, wanted, tl.where(begin < end, D, 0), DIRECT, BLOCK_E,
        SCAN_STAGES,
    )  # fmt: skip
    asks = asks & (square == square)
    best, best_slot, scored, largest, scan = _search(
        coordinates, norm, asks, wanted, source, source_stride, query_row, writes, first_query, B,
        S, keys, key_stride, radii, scales, head, tail, radius_bound, outliers, scratch, survivors,
        begin, end, n, m, D, norm_error, spread, BLOCK_B, PAIRS, ROOM, CHUNK, SCAN_N, SCAN_STAGES,
    )  # fmt: skip
    # A slice that is scanned has other candidates, later.
    slot = tl.where(best_slot < _NO_SLOT, best_slot, -1)
    _keep(bounds, slots, best, best, slot, largest, slice_id, block, slices, b, B)
    if scored > 0:
        tl.atomic_add(counters + 2, scored.to(tl.int64), sem="relaxed")
    scan = scan | (wanted == 0)
    scan_end = tl.where(scan & _any(asks, 0), end, begin)

    low_1, place_1, low_2, high_1, radius, some_live = _scan(
        query, asks, square, keys, key_stride, radii, begin, scan_end, D, relative, absolute,
        DIRECT, PRECISION, BLOCK_N, BLOCK_D, GROUPS, STAGES,
    )  # fmt: skip
    low, high, slot = _resolve(
        low_1, place_1, low_2, high_1, some_live, source, source_stride, asked, asks,
        keys, key_stride, radii, begin, scan_end, n, D, bounded, BLOCK_B, BLOCK_N, PAIRS,
    )  # fmt: skip
    tl.debug_barrier()
    if scan_end > begin:
        _keep(bounds, slots, low, high, slot, radius, slice_id, block, slices, b, B)
        asking = tl.sum(asks.to(tl.int64), axis=0)
        tl.atomic_add(counters + 3, asking * (scan_end - begin), sem="relaxed")
    if _last_to_arrive(tickets, block, slices):
        one_asks, _row = _asked(query_row, writes, b, B, S)
        asking = tl.sum(one_asks.to(tl.int64), axis=0)
        tl.atomic_add(counters, asking, sem="relaxed")
        tl.atomic_add(counters + 1, asking * m, sem="relaxed")
        _answer(
            source, source_stride, query_row, keys, key_stride, radii, index, distance, bounds,
            slots, tickets, hidden, hidden_row, hidden_column, first_row, last_row,
            values, value_row, value_column, block, slices, B, S, R, D, V, bounded, writes,
            BLOCK_B, PAIRS,
        )  # fmt: skip


pruned_kernels = as_laid_out(
    _pruned_kernel,
    ("scales", "covered", "radius_bound", "outliers", "counters", "scratch", "survivors"),
)
