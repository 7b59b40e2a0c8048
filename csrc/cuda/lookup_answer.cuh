// From intervals to answers, the same for both scans: what a slice resolves by itself, the ticket,
// and what the last block of a query block does.
#pragma once

#include "lookup_rows.cuh"

namespace grace::cuda {

constexpr int kMaxGroups = 32;  // groups of slots that are told apart inside a slice

// The nearest slot so far of a query, the lowest one among ties. A NaN counts as +inf.
struct Best {
  float s;
  int64_t slot;

  __device__ __forceinline__ void take(float other, int64_t other_slot) {
    if (is_nan(other)) other = infinity();
    if (slot < 0 || other < s || (other == s && other_slot < slot)) {
      s = other;
      slot = other_slot;
    }
  }
};

// For the few places where it is one pair, and rare.
template <class T>
__device__ __noinline__ float canonical_of_pair(const Problem& p, const T* query, const T* key) {
  const T* queries[1] = {query};
  const T* keys[1] = {key};
  float s[1];
  canonical<T, 1>(p, queries, keys, s);
  return s[0];
}

template <class T>
__device__ __forceinline__ void rescore(const Problem& p, const T* query, int64_t slot,
                                        Best& best) {
  best.take(canonical_of_pair<T>(p, query, key_of<T>(p, slot)), slot);
}

// What the scan found for one query in one group of slots of the slice: three smallest lower
// bounds, whose they are (places in the slice), and the smallest upper bound.
struct Found {
  float lo1, lo2, lo3, hi;
  int place1, place2;

  __device__ __forceinline__ void clear() {
    lo1 = lo2 = lo3 = hi = infinity();
    place1 = place2 = -1;
  }
  __device__ __forceinline__ void take(float lo, int place) {
    const bool first = lo < lo1, second = lo < lo2;
    lo3 = second ? lo2 : fminf(lo3, lo);
    lo2 = first ? lo1 : second ? lo : lo2;
    place2 = first ? place1 : second ? place : place2;
    lo1 = first ? lo : lo1;
    place1 = first ? place : place1;
  }
  __device__ __forceinline__ void merge(const Found& other) {
    take(other.lo1, other.place1);
    take(other.lo2, other.place2);
    lo3 = fminf(lo3, other.lo3);
    hi = fminf(hi, other.hi);
  }
};

// How the slots of a slice are dealt to groups: group g has places g * run + i * stride + j for all
// i and all j < run.
struct Groups {
  int count, run, stride;
};

// What stays in shared memory beside the memory of the scan.
template <int Q>
struct Shared {
  float largest[kWarps];
  unsigned arrived;
  float query_norm[Q];  // of the scan on tensor cores
  int64_t hit[Q];
};

__device__ __forceinline__ float least_of_warp(float v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v = fminf(v, shuffle_xor(v, mask));
  return v;
}
__device__ __forceinline__ float largest_of_warp(float v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v = fmaxf(v, shuffle_xor(v, mask));
  return v;
}

template <class T>
__device__ __forceinline__ bool holds_nan(const Problem& p, const T* row) {
  bool found = false;
  for (int at = lane_id(); at < p.dim; at += 32) found |= is_nan(widen(row[at]));
  return ballot(found) != 0;
}

// Canonically score the live slots first + i * stride + j < end, j < run.
template <class T>
__device__ __forceinline__ void rescore_group(const Problem& p, const T* query, int64_t first,
                                              int64_t end, int run, int stride, Best& best) {
  const int lane = lane_id();
  for (int64_t base = 0;; base += 32) {
    const int64_t start = first + base / run * stride + base % run;
    if (start >= end) break;
    const int64_t mine = first + (base + lane) / run * stride + (base + lane) % run;
    unsigned live = ballot(mine < end && radius_of(p, mine) != -infinity());
    for (; live != 0; live &= live - 1) rescore(p, query, shuffle(mine, __ffs(live) - 1), best);
  }
}

// No s beyond this has a root within a radius: Lemma 2 of docs/error-bounds.md. Where that is the
// largest radius, a slot beyond it is no hit, and keeps none from being one.
__device__ __forceinline__ float limit_of(float radius) {
  const double square = static_cast<double>(radius) * radius * (1 + 0x1p-22);
  return radius >= 0 ? __double2float_ru(square) : -infinity();
}

// The same of all slots, not only the slice's: its nearest may stand in the way of a farther hit
// elsewhere.
inline __device__ __noinline__ float limit_of_all(const Problem& p) {
  const int64_t n = slots_in_use(p);
  float largest = -infinity();
#pragma unroll 8
  for (int64_t slot = lane_id(); slot < n; slot += 32) {
    largest = fmaxf(largest, radius_of(p, slot));  // a NaN is no maximum
  }
  return limit_of(largest_of_warp(largest));
}

// Radii that are read in the time that scoring a key takes, roughly.
constexpr int64_t kRadiiPerKey = 1024;

// One warp: what this slice has to say of a query, given what its groups found. `limit` is
// limit_of_all(), or NaN as long as that was not worth reading all radii.
template <class T>
__device__ __forceinline__ Partial resolve(const Problem& p, const Slice& slice, const T* query,
                                           const Groups& groups, const Found* found, float& limit) {
  const int lane = lane_id();
  Found mine;
  mine.clear();
  if (lane < groups.count) mine = found[lane];
  const float u = least_of_warp(mine.hi);
  Best best = {infinity(), -1};
  // Without a bound, every live slot is too far, NaN or undecided, or there is none.
  if (u == infinity() && holds_nan(p, query)) return {best.s, best.s, best.slot};
  unsigned one = ballot(mine.lo1 <= u), two = ballot(mine.lo2 <= u), more = ballot(mine.lo3 <= u);
  float bound = u;
  if (p.bounded && ((one & (one - 1)) != 0 || two != 0)) {
    const int64_t slots = slice.end - slice.begin;
    const int64_t scored =
        u == infinity() ? slots : __popc(one) + __popc(two) + __popc(more) * (slots / groups.count);
    if (is_nan(limit) && scored * kRadiiPerKey > slots_in_use(p)) limit = limit_of_all(p);
    if (limit < bound) {
      bound = limit;
      one = ballot(mine.lo1 <= bound);
      two = ballot(mine.lo2 <= bound);
      more = ballot(mine.lo3 <= bound);
    }
  }
  if (bound == infinity()) {
    rescore_group(p, query, slice.begin, slice.end, 1, 1, best);
    return {best.s, best.s, best.slot};
  }
  if (one != 0 && (one & (one - 1)) == 0 && two == 0) {
    const int who = __ffs(one) - 1;
    return {shuffle(mine.lo1, who), u, slice.begin + shuffle(mine.place1, who)};
  }
  for (; one != 0; one &= one - 1) {
    const int who = __ffs(one) - 1;
    if (more >> who & 1) {
      rescore_group(p, query, slice.begin + who * groups.run, slice.end, groups.run, groups.stride,
                    best);
      continue;
    }
    rescore(p, query, slice.begin + shuffle(mine.place1, who), best);
    if (two >> who & 1) rescore(p, query, slice.begin + shuffle(mine.place2, who), best);
  }
  return {best.s, best.s, best.slot};
}

// Tell whether this block is the last of its query block to arrive. It then sees what all others
// wrote. The ticket wraps back to 0 by itself.
__device__ __forceinline__ bool arrive_last(unsigned* ticket, unsigned* shared) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *shared = atomicInc(ticket, gridDim.x - 1);
    __threadfence();
  }
  __syncthreads();
  return *shared == gridDim.x - 1;
}

template <class Unit>
__device__ __forceinline__ void write_rows(const Problem& p, int64_t slot, int64_t first,
                                           int64_t last) {
  const char* value = p.values + slot * p.value_stride;
  // The same thread has the same place of hidden for every query: where ranges overlap, the later
  // query's value stands.
  const int64_t at = first * p.units;
  int64_t unit = (threadIdx.x - at % kThreads + kThreads) % kThreads;
  for (int64_t row = first; row < last; unit += kThreads) {
    while (unit >= p.units && row < last) {
      unit -= p.units;
      ++row;
    }
    if (row >= last) break;
    *reinterpret_cast<Unit*>(p.hidden + row * p.hidden_stride + unit * p.hidden_step) =
        *reinterpret_cast<const Unit*>(value + unit * p.value_step);
  }
}

__device__ __forceinline__ int64_t clamp_row(int64_t row, int64_t rows) {
  return row < 0 ? 0 : row > rows ? rows : row;
}

// All threads: the value of slot `slot` to the rows of batch item b.
__device__ __forceinline__ void write_hit(const Problem& p, int64_t b, int64_t slot) {
  const int64_t first = clamp_row(p.first_row[b * p.first_row_stride], p.hidden_rows);
  const int64_t last = clamp_row(p.last_row[b * p.last_row_stride], p.hidden_rows);
  switch (p.unit) {
    case 2:
      write_rows<uint16_t>(p, slot, first, last);
      break;
    case 4:
      write_rows<uint32_t>(p, slot, first, last);
      break;
    case 8:
      write_rows<uint2>(p, slot, first, last);
      break;
    case 16:
      write_rows<uint4>(p, slot, first, last);
      break;
  }
}

template <int Q>
__device__ __forceinline__ void write_hits(const Problem& p, int64_t first_query,
                                           const Shared<Q>& shared) {
  for (int q = 0; q < Q; ++q) {
    if (shared.hit[q] >= 0) write_hit(p, first_query + q, shared.hit[q]);
  }
}

// The last block: the partials of all slices -> index, distance and rows of hidden. `memory` is
// shared memory for the partials.
template <class T, int Q>
__device__ __forceinline__ void finalise(const Problem& p, int64_t first_query,
                                         const Partial* partials, char* memory, Shared<Q>& shared) {
  constexpr int kAtOnce = Q > kWarps ? 4 : 1;  // queries of a warp, scored together
  const int slices = gridDim.x;
  const int lane = lane_id();
  Partial* part = reinterpret_cast<Partial*>(memory);
  for (int i = threadIdx.x; i < slices * (Q + 1); i += kThreads) {
    copy16(part + i, partials + i);
  }
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();

  float limit = infinity();
  if (p.bounded) {
    float radius = -infinity();
    for (int i = lane; i < slices; i += 32) radius = fmaxf(radius, part[i * (Q + 1) + Q].lo);
    limit = limit_of(largest_of_warp(radius));
  }

  for (int q0 = warp_id(); q0 < Q; q0 += kWarps * kAtOnce) {
    const T* query[kAtOnce];
    float bound[kAtOnce];
    int first[kAtOnce];  // contender, a slice
    unsigned later = 0;  // queries with a second contender
    const T *queries[kAtOnce], *keys[kAtOnce];
    Best best[kAtOnce];
    bool any = false;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int q = q0 + j * kWarps;
      query[j] = q < Q ? query_of<T>(p, first_query + q) : nullptr;
      best[j] = {infinity(), -1};
      first[j] = -1;
      if (query[j] == nullptr) continue;
      float u = infinity();
      for (int i = lane; i < slices; i += 32) u = fminf(u, part[i * (Q + 1) + q].hi);
      bound[j] = fminf(least_of_warp(u), limit);
      for (int base = 0; base < slices; base += 32) {
        const int i = base + lane;
        const bool contends =
            i < slices && part[i * (Q + 1) + q].row >= 0 && part[i * (Q + 1) + q].lo <= bound[j];
        const unsigned who = ballot(contends);
        if (who == 0) continue;
        if (first[j] >= 0 || (who & (who - 1)) != 0) later |= 1u << j;
        if (first[j] < 0) first[j] = base + __ffs(who) - 1;
      }
      any |= first[j] >= 0;
    }
    if (any) {
      // The first contender of every query, at once. Queries without one repeat another's.
      const T *some_query = nullptr, *some_key = nullptr;
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        queries[j] = query[j];
        keys[j] = nullptr;
        if (first[j] < 0) continue;
        keys[j] = key_of<T>(p, part[first[j] * (Q + 1) + q0 + j * kWarps].row);
        some_query = query[j];
        some_key = keys[j];
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (first[j] >= 0) continue;
        queries[j] = some_query;
        keys[j] = some_key;
      }
      float s[kAtOnce];
      canonical<T, kAtOnce>(p, queries, keys, s);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (first[j] >= 0) best[j].take(s[j], part[first[j] * (Q + 1) + q0 + j * kWarps].row);
      }
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int q = q0 + j * kWarps;
      if (q >= Q || first_query + q >= p.batch) continue;
      if (later >> j & 1) {
        for (int i = first[j] + 1; i < slices; ++i) {
          const Partial other = part[i * (Q + 1) + q];
          if (other.row < 0 || !(other.lo <= bound[j])) continue;
          if (other.lo == other.hi) {
            best[j].take(other.lo, other.row);  // resolved by its slice
          } else {
            rescore(p, query[j], other.row, best[j]);
          }
        }
      }
      if (lane != 0) continue;
      const float d = __fsqrt_rn(best[j].s);
      const bool hit = best[j].slot >= 0 && (!p.bounded || d <= radius_of(p, best[j].slot));
      shared.hit[q] = hit ? best[j].slot : -1;
      p.index[first_query + q] = hit ? best[j].slot : -1;
      p.distance[first_query + q] = hit ? d : infinity();
    }
  }
}

// The records of a query block, and those of this slice: one per query and one of the slice itself.
template <int Q>
__device__ __forceinline__ Partial* partials_of_block(const Problem& p) {
  const int64_t slices = gridDim.x;
  return static_cast<Partial*>(p.partials) + blockIdx.y * slices * (Q + 1);
}
template <int Q>
__device__ __forceinline__ Partial* partials_of_slice(const Problem& p) {
  return partials_of_block<Q>(p) + static_cast<int64_t>(blockIdx.x) * (Q + 1);
}

// All warps: resolve every query after a scan. `found` holds groups.count records per query,
// visible to all threads.
template <class T, int Q>
__device__ __forceinline__ void resolve_all(const Problem& p, const Slice& slice,
                                            const Groups& groups, const Found* found) {
  const int64_t first_query = static_cast<int64_t>(blockIdx.y) * Q;
  Partial* mine = partials_of_slice<Q>(p);
  if (p.apart_slices != 0) let_dependents_start();
  float limit = __uint_as_float(0x7fc00000u);  // NaN: not known
  for (int q = warp_id(); q < Q; q += kWarps) {
    const T* query = query_of<T>(p, first_query + q);
    if (query == nullptr) continue;
    const Partial partial = resolve<T>(p, slice, query, groups, found + q * groups.count, limit);
    if (lane_id() == 0) mine[q] = partial;
  }
}

// What a slice leaves behind beside its queries' records. `largest` is this thread's share of the
// bound of its radii, `scored` how many pairs its sketch left, or -1.
template <int Q>
__device__ __forceinline__ void leave_slice(const Problem& p, float largest, int64_t scored,
                                            Shared<Q>& shared) {
  largest = largest_of_warp(largest);
  if (lane_id() == 0) shared.largest[warp_id()] = largest;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, shared.largest[w]);
  partials_of_slice<Q>(p)[Q] = {largest, largest, scored};
}

// Everything after a slice has resolved its queries.
template <class T, int Q>
__device__ __forceinline__ void conclude(const Problem& p, float largest, int64_t scored,
                                         char* memory, Shared<Q>& shared) {
  const int64_t first_query = static_cast<int64_t>(blockIdx.y) * Q;
  leave_slice<Q>(p, largest, scored, shared);
  if (p.apart_slices != 0) return;  // the rest is a launch of its own
  if (!arrive_last(p.tickets + blockIdx.y, &shared.arrived)) return;
  for (int q = threadIdx.x; q < Q; q += kThreads) shared.hit[q] = -1;
  __syncthreads();
  finalise<T, Q>(p, first_query, partials_of_block<Q>(p), memory, shared);
  if (p.hidden == nullptr) return;
  __syncthreads();
  write_hits<Q>(p, first_query, shared);
}

}  // namespace grace::cuda
