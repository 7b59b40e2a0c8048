"""pruned_lookup and pruned_adapt_ in one launch: lookup_kernel.py, but few keys are read.

    key n is out of reach of x  if  |phi(x) - stored_n| > T (1 + 2^-21) + 2^-73 + e_x + e_n

The mathematics is in grace_kernels/sketch.py; e_x bounds the rounding of phi(x), see
`tiles.sketch_bound`. T is `radius_bound`, unless an entry with a larger radius is truly hit: then
whatever is at most as far as that one is within T too.

Tiling: slices times blocks of queries as without a sketch, slices cut at multiples of 32 rows. A
program sketches its queries, walks the ten head codes of each of its rows, SCAN_N rows at a time,
lists the pairs of a row and a query that may be within reach, strikes off that list those that all
65 numbers rule out, and scores the rest: its candidate is settled. Where a row is not covered, a
query cannot be sketched or the list is too long, the slice is scanned as without a sketch.

Bytes moved: 10 per row and block of queries and 66 for a row that is listed, beside 64 directions
that every program reads from the L2 cache. Limit: that cache for wide keys, then memory bandwidth.
"""

import triton
import triton.language as tl

from .lookup_kernel import (
    _INF,
    _NO_ROW,
    _answer,
    _any,
    _asked,
    _keep,
    _last_to_arrive,
    _scan,
    _settle,
    _squared_distances,
)

_SKETCH_BLOCK = tl.constexpr(32)  # rows whose codes for one number are neighbours
_HEAD_BYTES = tl.constexpr(10 * 32)  # of such a block
_TAIL_BYTES = tl.constexpr(56 * 32)
_UNKNOWN = tl.constexpr(127)
_OUTLIERS = tl.constexpr(32)
_WIDTH = tl.constexpr(72)  # floats of a query in the workspace: 64 coordinates, then these
_RHO_LOW = tl.constexpr(64)
_RHO_HIGH = tl.constexpr(65)
_ERROR = tl.constexpr(66)
_REACH = tl.constexpr(67)
_FEW = tl.constexpr(32)  # pairs, and 4 per query, that are always scored rather than scanned


@triton.jit
def _coordinates(query, asks, centre, directions, wanted, D, DIRECT: tl.constexpr,
                 BLOCK_E: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Return P y [64, BLOCK_B], |y|^2 and |x|^2 [BLOCK_B] of y = x - c; no P y unless `wanted`."""
    BLOCK_B: tl.constexpr = query.shape[0]
    j = tl.arange(0, 64)[:, None]
    if DIRECT:
        along = tl.zeros([64, BLOCK_B, BLOCK_E], tl.float32)
        norm = tl.zeros([BLOCK_B, BLOCK_E], tl.float32)
        square = tl.zeros([BLOCK_B, BLOCK_E], tl.float32)
    else:
        along = tl.zeros([64, BLOCK_B], tl.float32)
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
            along += p.to(tl.float32)[:, None, :] * y[None, :, :]
        else:
            x = tl.load(
                query[None, :] + at[:, None], mask=asks[None, :] & there[:, None], other=0.0
            ).to(tl.float32)
            y = x - c[:, None]
            high = y.to(tl.bfloat16)
            low = (y - high.to(tl.float32)).to(tl.bfloat16)
            # Subtractions, since Triton would make an addition the accumulator of the product.
            along -= tl.dot(p, high)
            along -= tl.dot(p, low)
        norm += y * y
        square += x * x
    across: tl.constexpr = 1 if DIRECT else 0
    along = tl.sum(along, axis=2) if DIRECT else -along
    return along, tl.sum(norm, axis=across), tl.sum(square, axis=across)


@triton.jit
def _rest(along, norm, middle, norm_error, spread):
    """Return [BLOCK_B] bounds of rho, less `middle`, of the error of all coordinates together, and
    whether these numbers mean something.

    With u = 2^-24, z = x - c and y its rounding, |y - z| <= u |z|. `norm` is within norm_error of
    |y|^2, relatively, so |y| and |z| are at most `size`: 2^-20 covers u and the root's rounding,
    2^-60 what underflows in up to 2^20 squares. `spread` bounds the coordinates' error relative to
    `size`, 2^-60 what underflows there. rho^2 = |z|^2 - |P z|^2 is v but for: the error of `norm`
    and 2 u |z|^2; |a|^2 - |P z|^2 <= e (2 |z| + e); 68 roundings of |a|^2 <= 1.02 size^2 and the
    subtraction's, all within 2^-17 size^2. 2 % cover the roundings of w itself.
    """
    lost = tl.sum(along * along, axis=0)
    size = tl.sqrt_rn(norm) * (1 + norm_error + 2.0**-20) + 2.0**-60
    error = size * spread + 2.0**-60
    v = norm - lost
    w = 1.02 * (size * size * (norm_error + 2.0**-17) + error * (2.1 * size + error)) + 2.0**-110
    low = tl.sqrt_rn(tl.maximum(v - w, 0.0)) * (1 - 2.0**-20)
    high = tl.sqrt_rn(tl.maximum(v, 0.0) + w) * (1 + 2.0**-20)
    far = tl.abs(middle)
    low = low - middle - 2.0**-22 * (low + far)
    high = high - middle + 2.0**-22 * (high + far)
    known = (norm < _INF) & (lost < _INF) & (w < _INF) & (error < _INF)
    return low, high, error, known & (low > -_INF) & (high < _INF)


@triton.jit
def _gap_squared(low, high, rho):
    gap = tl.maximum(tl.maximum(low - rho, rho - high), 0.0)
    return gap * gap


@triton.jit
def _key_error(code, scale):
    return tl.where(code == _UNKNOWN, _INF, code.to(tl.float32) * scale)


@triton.jit
def _beyond(q, reach, error):
    """Tell which keys are certainly out of reach; q is |phi(x) - stored|^2 or any part of it.

    q is a sum of 65 squares of differences, each rounded once, so less than 2^-17 too large,
    relatively. What t loses to rounding, 2^-21 for `reach` and 2^-16 for the square make up for.
    A NaN or an overflow on the right keeps the key.
    """
    t = reach * (1 + 2.0**-21) + 2.0**-73 + error
    return q > t * t * (1 + 2.0**-16) + 2.0**-120


@triton.jit
def _head_of_query(scratch, BLOCK_B: tl.constexpr):
    """Return the first 8 coordinates of the queries, [BLOCK_B] each."""
    coordinates = ()
    for j in tl.static_range(8):
        coordinates = coordinates + (tl.load(scratch + tl.arange(0, BLOCK_B) * _WIDTH + j),)
    return coordinates


@triton.jit
def _head_scales(scales):
    """Return the scales of rho, of e and of the first 8 coordinates."""
    first = ()
    for j in tl.static_range(10):
        first = first + (tl.load(scales + j),)
    return first


@triton.jit
def _head_bounds(codes, there, x, low, high, scale):
    """Return a lower bound [K, BLOCK_B] of |phi(x) - stored|^2, and e [K]; codes: those of rho."""
    rho = tl.load(codes, mask=there, other=0).to(tl.float32) * scale[0]
    e = _key_error(tl.load(codes + 32, mask=there, other=0), scale[1])
    q = _gap_squared(low[None, :], high[None, :], rho[:, None])
    for j in tl.static_range(8):
        coordinate = tl.load(codes + (2 + j) * 32, mask=there, other=0).to(tl.float32)
        difference = x[j][None, :] - (coordinate * scale[2 + j])[:, None]
        q += difference * difference
    return q, e


@triton.jit
def _append(pairs, listed, first, keep, LIST: tl.constexpr):
    """List the pairs that are kept, rows counted from `first` on; return how many there are then,
    LIST + 1 for too many.
    """
    K: tl.constexpr = keep.shape[0]
    BLOCK_B: tl.constexpr = keep.shape[1]
    pair = (first + tl.arange(0, K)[:, None]) * BLOCK_B + tl.arange(0, BLOCK_B)[None, :]
    kept = tl.reshape(keep.to(tl.int32), [K * BLOCK_B])
    place = listed + tl.cumsum(kept, axis=0) - kept
    tl.store(pairs + place, tl.reshape(pair, [K * BLOCK_B]), mask=(kept > 0) & (place < LIST))
    return tl.minimum(listed + tl.sum(kept, axis=0), LIST + 1)


@triton.jit
def _listed(pairs, at, there, begin, outliers, OWN: tl.constexpr, BLOCK_B: tl.constexpr):
    """Return the pairs at some places of the list, their rows and their queries' places."""
    pair = tl.load(pairs + at, mask=there, other=0)
    if OWN:
        row = tl.load(outliers + pair // BLOCK_B, mask=there, other=0)
    else:
        row = begin + pair // BLOCK_B
    return pair, row, pair % BLOCK_B


@triton.jit
def _strike(pairs, listed, begin, outliers, scratch, head, tail, scales, radii, OWN: tl.constexpr,
            BLOCK_B: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Strike from the list what all 65 numbers put out of reach (OWN: of the row's own radius);
    return how many pairs are left.
    """
    first = tl.arange(0, 8)[None, :]
    later = tl.arange(0, 64)[None, :]
    first_scale = tl.load(scales + 2 + first)
    later_scale = tl.load(scales + 10 + later, mask=later < 56, other=0.0)
    scale_rho, scale_e = tl.load(scales), tl.load(scales + 1)
    left = 0
    tl.debug_barrier()  # the list is in memory
    for start in range(0, listed, CHUNK):
        at = start + tl.arange(0, CHUNK)
        there = at < listed
        pair, row, q = _listed(pairs, at, there, begin, outliers, OWN, BLOCK_B)
        query = scratch + q * _WIDTH
        front = head + row // _SKETCH_BLOCK * _HEAD_BYTES + row % _SKETCH_BLOCK
        back = tail + row // _SKETCH_BLOCK * _TAIL_BYTES + row % _SKETCH_BLOCK
        some = there[:, None] & (later < 56)
        x = tl.load(query[:, None] + first, mask=there[:, None], other=0.0)
        code = tl.load(front[:, None] + (2 + first) * 32, mask=there[:, None], other=0)
        near = x - code.to(tl.float32) * first_scale
        x = tl.load(query[:, None] + 8 + later, mask=some, other=0.0)
        code = tl.load(back[:, None] + later * 32, mask=some, other=0)
        far = x - code.to(tl.float32) * later_scale
        rho = tl.load(front, mask=there, other=0).to(tl.float32) * scale_rho
        e = _key_error(tl.load(front + 32, mask=there, other=0), scale_e)
        low = tl.load(query + _RHO_LOW, mask=there, other=0.0)
        high = tl.load(query + _RHO_HIGH, mask=there, other=0.0)
        error = tl.load(query + _ERROR, mask=there, other=0.0)
        if OWN:
            reach = tl.load(radii + row, mask=there, other=0.0)
        else:
            reach = tl.load(query + _REACH, mask=there, other=0.0)
        size = _gap_squared(low, high, rho) + tl.sum(near * near, axis=1)
        size += tl.sum(far * far, axis=1)
        keep = there & (_beyond(size, reach, error + e) == 0)
        kept = keep.to(tl.int32)
        place = left + tl.cumsum(kept, axis=0) - kept
        tl.debug_barrier()  # everyone has read this chunk
        tl.store(pairs + place, pair, mask=keep)
        left += tl.sum(kept, axis=0)
    tl.debug_barrier()
    return left


@triton.jit
def _score(pairs, listed, begin, outliers, source, source_stride, query_row, first_query, B, S,
           keys, key_stride, radii, D, OWN: tl.constexpr, BLOCK_B: tl.constexpr,
           PAIRS: tl.constexpr):  # fmt: skip
    """Return s and row of each query's nearest listed key (OWN: of those that cover the query)."""
    best = tl.full([BLOCK_B], _INF, tl.float32)
    best_row = tl.full([BLOCK_B], _NO_ROW, tl.int64)
    for start in range(0, listed, PAIRS):
        at = start + tl.arange(0, PAIRS)
        wanted = at < listed
        _pair, row, q = _listed(pairs, at, wanted, begin, outliers, OWN, BLOCK_B)
        _asks, asked = _asked(query_row, first_query + q, B, S)
        s = _squared_distances(source + asked * source_stride, keys + row * key_stride, wanted, D)
        if OWN:
            wanted = wanted & (tl.sqrt_rn(s) <= tl.load(radii + row, mask=wanted, other=-_INF))
        mine = wanted[:, None] & (q[:, None] == tl.arange(0, BLOCK_B)[None, :])
        least = tl.min(tl.where(mine, s[:, None], _INF), axis=0)
        lowest = tl.min(
            tl.where(mine & (s[:, None] == least[None, :]), row[:, None], _NO_ROW), axis=0
        )
        nearer = (least < best) | ((least == best) & (lowest < best_row))
        best = tl.where(nearer, least, best)
        best_row = tl.where(nearer, lowest, best_row)
    return best, best_row


@triton.jit
def _reach(asks, wanted, x, low, high, error, scale, most, source, source_stride, query_row,
           first_query, B, S, keys, key_stride, radii, scales, head, tail, radius_bound, outliers,
           scratch, pairs, n, m, D, BLOCK_B: tl.constexpr, PAIRS: tl.constexpr,
           LIST: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Return T [BLOCK_B], within which lies every key that matters to a query, and a bound of all
    radii.

    A hit is the nearest key. If its radius is at most the bound, so are its distance and that of
    any key as near. If not it is one of the outliers, and then at most as far as the nearest
    outlier that covers the query.
    """
    bound = tl.load(radius_bound)
    row = tl.load(outliers + tl.arange(0, _OUTLIERS))
    live = (row >= 0) & (row < n)
    radius = tl.load(radii + row, mask=live, other=-_INF)
    live = live & (radius > bound)
    largest = tl.maximum(bound, tl.max(tl.where(live, radius, -_INF), axis=0))
    inside = live & (row < m) & (radius >= 0) & wanted
    uncovered = tl.max(tl.where(live & (row >= m), radius, -_INF), axis=0)
    reach = tl.maximum(tl.full([BLOCK_B], -_INF, tl.float32), tl.maximum(bound, uncovered))
    if _any(inside, 0) & _any(asks, 0):
        front = head + row // _SKETCH_BLOCK * _HEAD_BYTES + row % _SKETCH_BLOCK
        q, e = _head_bounds(front, inside, x, low, high, scale)
        beyond = _beyond(q, radius[:, None], error[None, :] + e[:, None])
        keep = inside[:, None] & asks[None, :] & (beyond == 0)
        listed = _append(pairs, 0, 0, keep, LIST)
        listed = _strike(
            pairs, listed, n, outliers, scratch, head, tail, scales, radii, True, BLOCK_B, CHUNK
        )
        if listed > most:
            reach = tl.maximum(reach, largest)
        else:
            s, hit = _score(
                pairs, listed, n, outliers, source, source_stride, query_row, first_query, B, S,
                keys, key_stride, radii, D, True, BLOCK_B, PAIRS,
            )  # fmt: skip
            reach = tl.where(hit < _NO_ROW, tl.maximum(reach, tl.sqrt_rn(s)), reach)
        tl.debug_barrier()  # before the list is written anew
    return reach, largest


@triton.jit
def _search(along, norm, asks, wanted, source, source_stride, query_row, first_query, B, S,
            keys, key_stride, radii, scales, head, tail, radius_bound, outliers, scratch, pairs,
            begin, end, n, m, D, norm_error, spread, BLOCK_B: tl.constexpr, PAIRS: tl.constexpr,
            LIST: tl.constexpr, CHUNK: tl.constexpr, SCAN_N: tl.constexpr,
            STAGES: tl.constexpr):  # fmt: skip
    """Look for each query's candidate among rows begin..end-1, all of them covered.

    Return s and row of the nearest row within reach, how many pairs were scored, a bound of all
    radii, and whether the slice has to be scanned instead.
    """
    low, high, error, known = _rest(along, norm, tl.load(scales + 66), norm_error, spread)
    fails = _any(asks & (known == 0), 0)
    asks = asks & known
    at = scratch + tl.arange(0, BLOCK_B) * _WIDTH
    tl.store(at[None, :] + tl.arange(0, 64)[:, None], along)
    tl.store(at + _RHO_LOW, low)
    tl.store(at + _RHO_HIGH, high)
    tl.store(at + _ERROR, error)
    tl.debug_barrier()
    x = _head_of_query(scratch, BLOCK_B)
    scale = _head_scales(scales)
    # Beyond that, a scan costs no more.
    most = tl.maximum((end - begin) // 4, _FEW + 4 * BLOCK_B)

    reach, largest = _reach(
        asks, wanted & (fails == 0), x, low, high, error, scale, most, source, source_stride,
        query_row, first_query, B, S, keys, key_stride, radii, scales, head, tail, radius_bound,
        outliers, scratch, pairs, n, m, D, BLOCK_B, PAIRS, LIST, CHUNK,
    )  # fmt: skip
    tl.store(at + _REACH, reach)

    # Dead rows are looked up only where their codes are near: hardly ever.
    asks = asks & (reach >= 0)
    runs = wanted & (fails == 0) & _any(asks, 0)
    rows = tl.where(runs, end - begin, 0).to(tl.int32)
    codes = head + begin // _SKETCH_BLOCK * _HEAD_BYTES
    place = tl.arange(0, SCAN_N)
    blocks = tl.cdiv(rows, _SKETCH_BLOCK)
    listed = 0
    for step in tl.range(0, tl.cdiv(rows, SCAN_N), num_stages=STAGES):
        nth = step * (SCAN_N // _SKETCH_BLOCK) + place // _SKETCH_BLOCK
        front = codes + nth.to(tl.int64) * _HEAD_BYTES + place % _SKETCH_BLOCK
        q, e = _head_bounds(front, nth < blocks, x, low, high, scale)
        beyond = _beyond(q, reach[None, :], error[None, :] + e[:, None])
        in_slice = step * SCAN_N + place < rows
        keep = in_slice[:, None] & asks[None, :] & (beyond == 0)
        if _any(keep, None) & (listed <= LIST):
            row = begin + step * SCAN_N + place
            radius = tl.load(radii + row, mask=_any(keep, 1), other=-_INF)
            keep = keep & (radius != -_INF)[:, None]
            listed = _append(pairs, listed, step * SCAN_N, keep, LIST)
    overflow = listed > LIST
    listed = tl.where(overflow, 0, listed)
    left = _strike(
        pairs, listed, begin, outliers, scratch, head, tail, scales, radii, False, BLOCK_B, CHUNK
    )
    overflow = overflow | (left > most)
    left = tl.where(overflow, 0, left)
    best, best_row = _score(
        pairs, left, begin, outliers, source, source_stride, query_row, first_query, B, S,
        keys, key_stride, radii, D, False, BLOCK_B, PAIRS,
    )  # fmt: skip
    return best, best_row, left, largest, fails | overflow


# See lookup_kernel about what is not specialized.
@triton.jit(
    do_not_specialize=["B", "S", "R", "C", "sketch_rows"],
    do_not_specialize_on_alignment=[
        "query_row", "first_row", "last_row", "radii", "count", "index", "distance", "bounds",
        "rows", "tickets", "scales", "covered", "radius_bound", "outliers", "counters", "scratch",
        "pairs",
    ],
)  # fmt: skip
def pruned_kernel(
    source, source_stride, query_row,  # as lookup_kernel, up to `absolute`
    keys, key_stride, radii, count,
    index, distance,
    bounds, rows, tickets,
    hidden, hidden_row, hidden_column, first_row, last_row,
    values, value_row, value_column,
    B: tl.int64, S: tl.int64, R: tl.int64, C: tl.int64, D, V,
    relative, absolute,
    centre, directions, scales, head, tail, covered, radius_bound, outliers, counters,
    scratch, pairs,  # workspace of each program: fp32 [BLOCK_B, 72], int32 [LIST]
    sketch_rows: tl.int64,  # that head and tail have memory for
    norm_error, spread,  # of a query's sketch
    DIRECT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUPS: tl.constexpr,
    PAIRS: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_E: tl.constexpr,  # elements of a query sketched at a time
    SCAN_N: tl.constexpr, SCAN_STAGES: tl.constexpr,  # rows whose head is read at a time
    LIST: tl.constexpr, CHUNK: tl.constexpr,  # pairs listed, and looked at together
):  # fmt: skip
    slice_id, block = tl.program_id(0), tl.program_id(1)
    slices = tl.num_programs(0)
    n = C.to(tl.int64)  # the interpreter takes it for an int32
    if count is not None:
        n = tl.minimum(tl.maximum(tl.load(count), 0), n)
    m = tl.minimum(tl.maximum(tl.load(covered), 0), tl.minimum(n, sketch_rows.to(tl.int64)))
    per_slice = tl.cdiv(tl.cdiv(n, slices), _SKETCH_BLOCK) * _SKETCH_BLOCK
    begin = tl.minimum(slice_id * per_slice, n)
    end = tl.minimum(begin + per_slice, n)
    program = (block * slices + slice_id).to(tl.int64)
    scratch += program * (BLOCK_B * _WIDTH)
    pairs += program * LIST

    first_query = block.to(tl.int64) * BLOCK_B
    b = first_query + tl.arange(0, BLOCK_B)
    asks, asked = _asked(query_row, b, B, S)
    query = source + asked * source_stride
    wanted = (begin < end) & (end <= m)
    along, norm, square = _coordinates(
        query, asks, centre, directions, wanted, tl.where(begin < end, D, 0), DIRECT, BLOCK_E,
        SCAN_STAGES,
    )  # fmt: skip
    asks = asks & (square == square)
    best, best_row, scored, largest, scan = _search(
        along, norm, asks, wanted, source, source_stride, query_row, first_query, B, S,
        keys, key_stride, radii, scales, head, tail, radius_bound, outliers, scratch, pairs,
        begin, end, n, m, D, norm_error, spread, BLOCK_B, PAIRS, LIST, CHUNK, SCAN_N, SCAN_STAGES,
    )  # fmt: skip
    # A slice that is scanned has other candidates, later.
    row = tl.where(best_row < _NO_ROW, best_row, -1)
    _keep(bounds, rows, best, best, row, largest, slice_id, block, slices, b, B)
    if scored > 0:
        tl.atomic_add(counters + 2, scored.to(tl.int64), sem="relaxed")
    scan = scan | (wanted == 0)
    scan_end = tl.where(scan & _any(asks, 0), end, begin)

    low_1, place_1, low_2, high_1, radius, some_live = _scan(
        query, asks, square, keys, key_stride, radii, begin, scan_end, D, relative, absolute,
        DIRECT, PRECISION, BLOCK_N, BLOCK_D, GROUPS, STAGES,
    )  # fmt: skip
    low, high, row = _settle(
        low_1, place_1, low_2, high_1, some_live, source, source_stride, asked, asks,
        keys, key_stride, radii, begin, scan_end, n, D, True, BLOCK_B, BLOCK_N, PAIRS,
    )  # fmt: skip
    tl.debug_barrier()
    if scan_end > begin:
        _keep(bounds, rows, low, high, row, radius, slice_id, block, slices, b, B)
        asking = tl.sum(asks.to(tl.int64), axis=0)
        tl.atomic_add(counters + 3, asking * (scan_end - begin), sem="relaxed")
    if _last_to_arrive(tickets, block, slices):
        one_asks, _row = _asked(query_row, b, B, S)
        asking = tl.sum(one_asks.to(tl.int64), axis=0)
        tl.atomic_add(counters, asking, sem="relaxed")
        tl.atomic_add(counters + 1, asking * m, sem="relaxed")
        _answer(
            source, source_stride, query_row, keys, key_stride, radii, index, distance, bounds,
            rows, tickets, hidden, hidden_row, hidden_column, first_row, last_row,
            values, value_row, value_column, block, slices, B, S, R, D, V, True, BLOCK_B, PAIRS,
        )  # fmt: skip
