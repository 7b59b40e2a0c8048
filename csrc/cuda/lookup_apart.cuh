// Answers in a launch of their own, behind the scan: a block per query, instead of the last block
// of the scan for all queries of its block.
//
// A slice then leaves its records and is done: no ticket. Here the contenders of a query, slots
// whose interval reaches below the least upper bound, go round the warps; a warp scores its pair
// with both rows on their way through a ring of 8 KB, so that the memory's latency is paid once and
// not once per 256 elements. Costs one more node of a graph; pays where there are many queries or
// wide rows. Bytes read: 32 per slice and query, two rows per contender. Counted, not measured.
#pragma once

#include "lookup_answer.cuh"
#include "lookup_chunks.cuh"

namespace grace::cuda {

constexpr int kPairBytes = 8192;   // of a warp's ring
constexpr int kMostSlices = 1024;  // whose contenders there is room for at a time

// What is in shared memory.
struct Apart {
  char rings[kWarps][kPairBytes];
  float least[kWarps], largest[kWarps];
  Best best[kWarps];
  unsigned contenders;
  int64_t hit;
  int contender[kMostSlices];  // slices
};

// One warp: the canonical squared distance of two aligned rows, known to all lanes.
template <class T>
__device__ __forceinline__ float canonical_through_ring(const Problem& p, const T* query,
                                                        const T* key, char* ring) {
  constexpr int kStageBytes = 2 * Chunk<T>::kBytes, kStages = kPairBytes / kStageBytes;
  static_assert(kStages >= 4);
  const int row_bytes = p.dim * static_cast<int>(sizeof(T)), chunks = chunks_of<T>(p);
  int filled = 0, fill_at = 0, read_at = 0;
  const auto fill = [&] {
    if (filled < chunks) {
      const int from = filled * Chunk<T>::kBytes;
      copy_chunk<T>(ring + fill_at, reinterpret_cast<const char*>(query) + from, row_bytes - from);
      copy_chunk<T>(ring + fill_at + Chunk<T>::kBytes, reinterpret_cast<const char*>(key) + from,
                    row_bytes - from);
      ++filled;
      fill_at = (fill_at + kStageBytes) % kPairBytes;
    }
    commit_copies();
  };
  converge();  // all have read what is in the ring from before
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) fill();
  double sum[1] = {0};
#pragma unroll 1
  for (int left = row_bytes, chunk = 0; chunk < chunks; left -= Chunk<T>::kBytes, ++chunk) {
    wait_for_copies<kStages - 2>();
    if constexpr (Chunk<T>::kShared) converge();  // all have copied this one, and read the last
    fill();
    double x[8], k[8];
    read_chunk<T>(ring + read_at, left, x);
    read_chunk<T>(ring + read_at + Chunk<T>::kBytes, left, k);
    sum[0] = add_squares(sum[0], x, k);
    read_at = (read_at + kStageBytes) % kPairBytes;
  }
  wait_for_copies<0>();
  return __double2float_rn(fold_of_warp<1, 16>(sum));
}

// The record of slice i for query q of a block of `queries`, or for q = queries that of the slice.
__device__ __forceinline__ Partial record_of(const Problem& p, int64_t block, int64_t i, int q) {
  const int64_t at = (block * p.apart_slices + i) * (p.apart_queries + 1) + q;
  const uint4 words = load16(static_cast<const Partial*>(p.partials) + at);
  const uint64_t row = static_cast<uint64_t>(words.w) << 32 | words.z;
  return {__uint_as_float(words.x), __uint_as_float(words.y), static_cast<int64_t>(row)};
}

// What finalise() decides of a query, by a block.
template <class T>
__device__ __forceinline__ void answer_apart(const Problem& p, Apart& shared) {
  const int64_t b = blockIdx.x, block = b / p.apart_queries;
  const int q = static_cast<int>(b % p.apart_queries), slices = p.apart_slices;
  const int lane = lane_id(), warp = warp_id();
  wait_for_launch_before();
  const T* query = query_of<T>(p, b);
  if (query == nullptr) {  // the same for all threads
    if (threadIdx.x == 0) p.index[b] = -1, p.distance[b] = infinity();
    return;
  }
  float least = infinity(), largest = -infinity();
  for (int i = threadIdx.x; i < slices; i += kThreads) {
    least = fminf(least, record_of(p, block, i, q).hi);
    if (p.bounded) largest = fmaxf(largest, record_of(p, block, i, p.apart_queries).lo);
  }
  least = least_of_warp(least);
  largest = largest_of_warp(largest);
  if (lane == 0) shared.least[warp] = least, shared.largest[warp] = largest;
  if (threadIdx.x == 0) shared.contenders = 0;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    least = fminf(least, shared.least[w]);
    largest = fmaxf(largest, shared.largest[w]);
  }
  const float bound = p.bounded ? fminf(least, limit_of(largest)) : least;

  Best best = {infinity(), -1};
  for (int base = 0; base < slices; base += kMostSlices) {
    const int end = base + kMostSlices < slices ? base + kMostSlices : slices;
    for (int i = base + threadIdx.x; i < end; i += kThreads) {
      const Partial record = record_of(p, block, i, q);
      if (record.row < 0 || !(record.lo <= bound)) continue;
      if (record.lo == record.hi) {
        best.take(record.lo, record.row);  // resolved by its slice
      } else {
        shared.contender[atomicAdd(&shared.contenders, 1u)] = i;
      }
    }
    __syncthreads();
    const int contenders = static_cast<int>(shared.contenders);
    for (int c = warp; c < contenders; c += kWarps) {
      const int64_t slot = record_of(p, block, shared.contender[c], q).row;
      const float s =
          p.keys_aligned && p.source_aligned
              ? canonical_through_ring<T>(p, query, key_of<T>(p, slot), shared.rings[warp])
              : canonical_of_pair<T>(p, query, key_of<T>(p, slot));
      best.take(shuffle(s, 0), slot);
    }
    __syncthreads();
    if (threadIdx.x == 0) shared.contenders = 0;
    __syncthreads();
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const float s = shuffle_xor(best.s, mask);
    const int64_t slot = shuffle_xor(best.slot, mask);
    if (slot >= 0) best.take(s, slot);
  }
  if (lane == 0) shared.best[warp] = best;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) {
      if (shared.best[w].slot >= 0) best.take(shared.best[w].s, shared.best[w].slot);
    }
    const float d = __fsqrt_rn(best.s);
    const bool hit = best.slot >= 0 && (!p.bounded || d <= radius_of(p, best.slot));
    shared.hit = hit ? best.slot : -1;
    p.index[b] = shared.hit;
    p.distance[b] = hit ? d : infinity();
  }
  if (p.hidden == nullptr) return;
  __syncthreads();
  if (shared.hit >= 0) write_hit(p, b, shared.hit);
}

}  // namespace grace::cuda
