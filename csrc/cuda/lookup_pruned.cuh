// The lookup with a sketch of the keys: a block reads the keys of its slice only where the sketch
// leaves a doubt, or all of them if it leaves too many.
//
//   d(x, k) >= |phi(x) - stored| - e   =>   out of reach T if |phi(x) - stored|^2 > (T + e + ..)^2
//
// A hit lies within its own radius, and only a key at least as near can take its place. So T is
// radius_bound, and where one of the few entries with a larger radius is a hit itself, at least its
// distance: everything that can decide is within T. (The nearest key n is a hit: either its radius
// is at most radius_bound, or it is one of those few and its own distance is T's. It is none, but
// another one n' would be if n were not seen: d(n) <= d(n'), and n' is within T by the same rule.
// This is Lemma 20 of docs/error-bounds.md.)
//
// Tiling: as the lookup without a sketch, slices times blocks of queries; slices begin at multiples
// of 32 slots. A block sketches its queries itself; a lane then takes four neighbouring keys, a
// warp 128, against up to 8 queries: residual and 8 coordinates first, the other 56 by eights where
// a key of the tile is left. What survives is scored canonically, a warp per pair.
// Bytes read: 10 per key and block of queries, 56 more where the head does not suffice, no radii,
// and 128 D of directions per block, from L2. Limit: those 128 D, up to some 10^5 keys. Counted,
// not measured.
#pragma once

#include "lookup_coordinates.cuh"

namespace grace::cuda {

constexpr int kSurvivors = 1024;  // pairs that there is room for

using Word = unsigned long long;

// What is in shared memory until a slice is resolved, or before it is scanned instead.
template <int Q>
struct Pruning {
  Sketched query[Q];
  float wide[Q];  // their reaches, widened
  unsigned survivors;
  unsigned unclear;  // a query that cannot be sketched
  Word best[Q];      // s and place in the slice: the smaller, the better
  uint2 pair[kSurvivors];
  float sums[Projection<Q>::kTurns * Q * Projection<Q>::kSums];
};

__device__ __forceinline__ int64_t slots_covered(const Problem& p) {
  const int64_t n = slots_in_use(p);
  int64_t covered = *p.sketch.covered;
  if (covered > p.sketch.blocks * kBlockSlots) covered = p.sketch.blocks * kBlockSlots;
  return covered < 0 ? 0 : covered > n ? n : covered;
}

// Of the queries of a block, how many ask. The same for all threads.
template <class T, int Q>
__device__ __forceinline__ int asking(const Problem& p, int64_t first_query) {
  int asking = 0;
#pragma unroll
  for (int base = 0; base < Q; base += 32) {
    const int q = base + lane_id();
    asking += __popc(ballot(q < Q && query_of<T>(p, first_query + q) != nullptr));
  }
  return asking;
}

// The slots that radius_bound does not speak of, one per lane.
static_assert(kOutliers == 32);
struct Outliers {
  int64_t slot;  // covered, with a radius above radius_bound; otherwise -1
  float radius;  // its radius
  float reach;   // no radius but those slots' is larger
  float all;     // no radius is larger
};

__device__ __forceinline__ Outliers outliers_of(const Problem& p, int64_t covered) {
  const float bound = *p.sketch.radius_bound;
  Outliers mine;
  mine.slot = p.sketch.outliers[lane_id()];
  if (mine.slot >= slots_in_use(p)) mine.slot = -1;
  mine.radius = mine.slot >= 0 ? radius_of(p, mine.slot) : -infinity();
  const float uncovered = mine.slot >= covered ? mine.radius : -infinity();
  // A NaN is no maximum, except that nothing would be known.
  mine.reach = is_nan(bound) ? infinity() : fmaxf(bound, largest_of_warp(uncovered));
  mine.all = fmaxf(mine.reach, largest_of_warp(mine.radius));
  if (mine.slot >= covered || !(mine.radius > bound)) mine.slot = -1;
  return mine;
}

// Whether the sketch leaves it open if a query is within the radius of this lane's outlier.
__device__ __forceinline__ bool may_cover(const SketchView& sketch, const Outliers& mine,
                                          const Sketched& query) {
  if (mine.slot < 0 || !(mine.radius >= 0)) return false;
  const int8_t* head = sketch.head + mine.slot / kBlockSlots * kHeadBytes + mine.slot % kBlockSlots;
  const int8_t* tail = sketch.tail + mine.slot / kBlockSlots * kTailBytes + mine.slot % kBlockSlots;
  float gap = gap_of_residual(query, head[kResidual * kBlockSlots] * sketch.scales[kResidual]);
  const float error = error_of(head[kError * kBlockSlots], sketch.scales[kError]);
#pragma unroll 8
  for (int j = 0; j < kDirections; ++j) {
    const int8_t* code =
        j < kHead ? head + (kCoordinates + j) * kBlockSlots : tail + (j - kHead) * kBlockSlots;
    gap = gap_of_one(query.coordinates[j], *code * sketch.scales[kCoordinates + j], gap);
  }
  return !out_of_reach(gap, widened(mine.radius, query.error), error);
}

// One warp: how far from a query keys are looked for. A negative number: nowhere.
template <class T>
__device__ __forceinline__ float reach_of(const Problem& p, const T* query, const Outliers& mine,
                                          const Sketched& sketched) {
  float least = infinity();
  bool found = false;
  for (unsigned open = ballot(may_cover(p.sketch, mine, sketched)); open != 0; open &= open - 1) {
    const int who = __ffs(open) - 1;
    float s = canonical_of_pair<T>(p, query, key_of<T>(p, shuffle(mine.slot, who)));
    if (is_nan(s)) s = infinity();
    if (!(__fsqrt_rn(s) <= shuffle(mine.radius, who))) continue;
    least = fminf(least, s);
    found = true;
  }
  // The root is rounded alike for every s, so that none up to `least` has a larger one.
  return found ? fmaxf(mine.reach, __fsqrt_rn(least)) : mine.reach;
}

// Code `k` of four, exactly: the float 2^23 + code + 128 is put together from bytes.
__device__ __forceinline__ float code_of(uint32_t codes, int k) {
  return __uint_as_float(__byte_perm(codes ^ 0x80808080u, 0x4b000000u, 0x7650 + k)) - 8388736.0f;
}

// Of four keys of this lane, for which those of the 56 coordinates that are needed leave a doubt.
// All lanes of a warp take part, whether they have keys or not.
__device__ __forceinline__ unsigned filter_tail(const SketchView& sketch, const int8_t* tail,
                                                const Sketched& query, float wide,
                                                const float (&error)[4], float (&gap)[4],
                                                unsigned left) {
#pragma unroll 1
  for (int j = 0; j < kTailNumbers; j += 8) {
    if (ballot(left != 0) == 0) break;
    if (left == 0) continue;
    uint32_t codes[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      codes[i] = *reinterpret_cast<const uint32_t*>(tail + (j + i) * kBlockSlots);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float scale = sketch.scales[kHeadNumbers + j + i];
      const float coordinate = query.coordinates[kHead + j + i];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        gap[k] = gap_of_one(coordinate, code_of(codes[i], k) * scale, gap[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (out_of_reach(gap[k], wide, error[k])) left &= ~(1u << k);
    }
  }
  return left;
}

// List the survivors: live slots of a slice that may be within a query's reach, as far as there is
// `room`. More are counted, not all of them.
template <int Q>
__device__ __forceinline__ void filter(const Problem& p, const Slice& slice, Pruning<Q>& pruning,
                                       unsigned room) {
  constexpr int kKeys = 128;              // of a warp at a time
  constexpr int kAtOnce = Q < 8 ? Q : 8;  // queries
  const SketchView& sketch = p.sketch;
  const int lane = lane_id();
  const int slots = static_cast<int>(slice.end - slice.begin);
  const int items = (slots + kKeys - 1) / kKeys * (Q / kAtOnce);
#pragma unroll 1
  for (int item = warp_id(); item < items; item += kWarps) {
    const unsigned so_far = *static_cast<volatile unsigned*>(&pruning.survivors);
    if (ballot(so_far > room) != 0) break;
    const int place = item / (Q / kAtOnce) * kKeys + lane * 4;
    const int q0 = item % (Q / kAtOnce) * kAtOnce;
    const int64_t block = (slice.begin + place) / kBlockSlots;
    const int in_block = lane * 4 % kBlockSlots;
    float stored[kHead + 1][4], error[4];
    const unsigned here = place >= slots       ? 0
                          : place + 4 <= slots ? 15
                                               : (1u << (slots - place)) - 1;
    {
      uint32_t codes[kHeadNumbers];
      const int8_t* head = sketch.head + block * kHeadBytes + in_block;
#pragma unroll
      for (int j = 0; j < kHeadNumbers; ++j) {
        codes[j] = 0;
        if (here != 0) codes[j] = *reinterpret_cast<const uint32_t*>(head + j * kBlockSlots);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        stored[0][k] = code_of(codes[kResidual], k) * sketch.scales[kResidual];
        error[k] = error_of(code_of(codes[kError], k), sketch.scales[kError]);
#pragma unroll
        for (int j = 0; j < kHead; ++j) {
          stored[1 + j][k] = code_of(codes[kCoordinates + j], k) * sketch.scales[kCoordinates + j];
        }
      }
    }
#pragma unroll 1
    for (int q = q0; q < q0 + kAtOnce; ++q) {
      const Sketched& query = pruning.query[q];
      if (!query.looks) continue;
      // One query may have shown that the sketch is of no use here; each costs seven round trips.
      if (p.sums != nullptr && q > q0) {
        const unsigned found = *static_cast<volatile unsigned*>(&pruning.survivors);
        if (ballot(found > room) != 0) break;
      }
      const float wide = pruning.wide[q];
      float gap[4];
      unsigned left = here;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        gap[k] = gap_of_residual(query, stored[0][k]);
#pragma unroll
        for (int j = 0; j < kHead; ++j) {
          gap[k] = gap_of_one(query.coordinates[j], stored[1 + j][k], gap[k]);
        }
        if (out_of_reach(gap[k], wide, error[k])) left &= ~(1u << k);
      }
      if (ballot(left != 0) == 0) continue;
      const int8_t* tail = sketch.tail + block * kTailBytes + in_block;
      left = filter_tail(sketch, tail, query, wide, error, gap, left);
      for (; left != 0; left &= left - 1) {
        const int found = place + __ffs(left) - 1;
        if (radius_of(p, slice.begin + found) == -infinity()) continue;
        const unsigned at = atomicAdd(&pruning.survivors, 1u);
        if (at < room) pruning.pair[at] = {static_cast<uint32_t>(found), static_cast<uint32_t>(q)};
      }
    }
  }
}

// What becomes of a slice: a bound of its radii, and the pairs that were scored, -1 if there are
// too many of them. Then nothing has happened, and it must be scanned.
struct Resolved {
  float largest;
  int scored;
};

template <class T, class Shape>
__device__ __forceinline__ Resolved resolve_by_sketch(const Problem& p, const Slice& slice) {
  constexpr int Q = Shape::kQueries;
  constexpr Resolved kScan = {0, -1};
  static_assert(sizeof(Pruning<Q>) <= Shape::kScanBytes);
  Pruning<Q>& pruning = *reinterpret_cast<Pruning<Q>*>(dynamic_shared());
  const int64_t covered = slots_covered(p);
  if (slice.end > covered) return kScan;
  const int64_t first_query = static_cast<int64_t>(blockIdx.y) * Q;
  const int slots = static_cast<int>(slice.end - slice.begin);
  Partial* const mine = partials_of_slice<Q>(p);
  if (slots == 0 || asking<T, Q>(p, first_query) == 0) {
    for (int q = threadIdx.x; q < Q; q += kThreads) mine[q] = {infinity(), infinity(), -1};
    return {-infinity(), 0};
  }
  if (threadIdx.x == 0) pruning.survivors = pruning.unclear = 0;
  if (p.sums == nullptr) project<T, Q>(p, first_query, pruning.sums, 0, p.dim);
  __syncthreads();
  for (int q = warp_id(); q < Q; q += kWarps) {
    const T* query = query_of<T>(p, first_query + q);
    Sketched& sketched = pruning.query[q];
    bool clear = true;
    if (query != nullptr) {
      const Projected all =
          p.sums == nullptr ? projected<Q>(pruning.sums, q) : projected_before(p, first_query + q);
      clear = measure(p.sketch, all, sketched);
    }
    // A NaN is a miss, and no reason to scan.
    const bool asks = query != nullptr && (clear || !holds_nan(p, query));
    if (lane_id() != 0) continue;
    sketched.looks = asks;
    if (asks && !clear) pruning.unclear = 1;
    pruning.best[q] = ~Word{0};
  }
  __syncthreads();
  const bool unclear = pruning.unclear != 0;
  const Outliers outliers = outliers_of(p, covered);
  for (int q = warp_id(); q < Q && !unclear; q += kWarps) {
    Sketched& sketched = pruning.query[q];
    if (!sketched.looks) continue;
    const float reach = reach_of<T>(p, query_of<T>(p, first_query + q), outliers, sketched);
    if (lane_id() != 0) continue;
    sketched.looks = reach >= 0;
    pruning.wide[q] = widened(reach, sketched.error);
  }
  __syncthreads();
  if (unclear) return kScan;
  // As many as are sooner scored than the slice is scanned.
  const unsigned room = Q + slots / 4 < kSurvivors ? Q + slots / 4 : kSurvivors;
  filter<Q>(p, slice, pruning, room);
  __syncthreads();
  const unsigned survivors = pruning.survivors;
  if (survivors > room) {
    __syncthreads();  // a scan writes where others still read
    return kScan;
  }
  for (unsigned i = warp_id(); i < survivors; i += kWarps) {
    const int place = static_cast<int>(pruning.pair[i].x), q = static_cast<int>(pruning.pair[i].y);
    const T* query = query_of<T>(p, first_query + q);
    float s = canonical_of_pair<T>(p, query, key_of<T>(p, slice.begin + place));
    if (is_nan(s)) s = infinity();
    if (lane_id() == 0) {
      atomicMin(&pruning.best[q], static_cast<Word>(__float_as_uint(s)) << 32 | place);
    }
  }
  __syncthreads();
  for (int q = threadIdx.x; q < Q; q += kThreads) {
    const Word best = pruning.best[q];
    const bool any = best != ~Word{0};
    const float s = any ? __uint_as_float(static_cast<uint32_t>(best >> 32)) : infinity();
    mine[q] = {s, s, any ? slice.begin + static_cast<uint32_t>(best) : -1};
  }
  return {outliers.all, static_cast<int>(survivors)};
}

// The last block of a query block, after everything else: add to the counters what all have done.
template <class T, int Q>
__device__ __forceinline__ void tally(const Problem& p, const Shared<Q>& shared) {
  const int slices = gridDim.x;
  if (shared.arrived != gridDim.x - 1 || warp_id() != 0) return;
  const int64_t asked = asking<T, Q>(p, static_cast<int64_t>(blockIdx.y) * Q);
  const Partial* part = reinterpret_cast<const Partial*>(dynamic_shared());  // since finalise()
  int64_t scored = 0, scanned = 0;
  for (int i = lane_id(); i < slices; i += 32) {
    const int64_t of_slice = part[i * (Q + 1) + Q].row;
    const Slice slice = slice_of(p, i, kBlockSlots);
    scored += of_slice < 0 ? 0 : of_slice;
    scanned += of_slice < 0 ? slice.end - slice.begin : 0;
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    scored += shuffle_xor(scored, mask);
    scanned += shuffle_xor(scanned, mask);
  }
  if (lane_id() != 0) return;
  const int64_t counts[kCounters] = {asked, asked * slots_covered(p), scored, asked * scanned};
#pragma unroll
  for (int i = 0; i < kCounters; ++i) {
    if (counts[i] == 0) continue;
    atomicAdd(reinterpret_cast<Word*>(p.sketch.counters) + i, static_cast<Word>(counts[i]));
  }
}

}  // namespace grace::cuda
