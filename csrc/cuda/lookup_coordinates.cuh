// The sketches of queries, begun in a launch of their own before a lookup through a sketch.
//
// A block of that lookup otherwise reads all directions, 128 D bytes, from L2, and as many blocks
// do as the device holds: at D = 4096 135 MB, many times the codes. Here a block takes 8 queries
// and 256 elements, 32 a warp, adds up over its warps and leaves kSums numbers per query; the
// lookup adds up over ceil(D / 256) such parts. Counted, not measured.
#pragma once

#include "lookup_sketch.cuh"

namespace grace::cuda {

constexpr int kTogether = 8;     // queries
constexpr int kPartWidth = 256;  // elements
constexpr int kQuerySums = Projection<kTogether>::kSums;
constexpr int kCoordinateBytes =
    Projection<kTogether>::kTurns * kTogether * kQuerySums * static_cast<int>(sizeof(float));
static_assert(Projection<kTogether>::kTurns * 32 == kPartWidth);

__host__ __device__ constexpr int parts_of(int dim) { return (dim + kPartWidth - 1) / kPartWidth; }

template <class T>
__device__ __forceinline__ void begin_sketches(const Problem& p) {
  let_dependents_start();
  float* sums = reinterpret_cast<float*>(dynamic_shared());
  const int from = blockIdx.x * kPartWidth;
  const int to = from + kPartWidth < p.dim ? from + kPartWidth : p.dim;
  const int64_t first_query = static_cast<int64_t>(blockIdx.y) * kTogether;
  project<T, kTogether>(p, first_query, sums, from, to);
  __syncthreads();
  for (int i = threadIdx.x; i < kTogether * kQuerySums; i += kThreads) {
    const int64_t b = first_query + i / kQuerySums;
    if (b >= p.batch) break;
    float all = 0;
#pragma unroll
    for (int turn = 0; turn < Projection<kTogether>::kTurns; ++turn) {
      all += sums[turn * kTogether * kQuerySums + i];
    }
    p.sums[(blockIdx.x * p.batch + b) * kQuerySums + i % kQuerySums] = all;
  }
}

// All threads of a lookup whose sketches were begun: until those are there, the first of a slice's
// codes come as far as L2, a line a thread.
__device__ __forceinline__ void wait_for_sketches(const Problem& p, const Slice& slice) {
  if (p.sums == nullptr) return;
  const int64_t first = slice.begin / kBlockSlots,
                end = (slice.end + kBlockSlots - 1) / kBlockSlots;
  const int64_t at = first * kHeadBytes + threadIdx.x * 128;
  if (at < (end < p.sketch.blocks ? end : p.sketch.blocks) * kHeadBytes) {
    prefetch(p.sketch.head + at);
  }
  wait_for_launch_before();
}

// One warp: what all parts of the width come to for batch item b.
__device__ __forceinline__ Projected projected_before(const Problem& p, int64_t b) {
  const int lane = lane_id(), parts = parts_of(p.dim);
  Projected all = {0, 0, 0};
// More at a time cost the kernel of 64 queries spilled registers on sm_90.
#pragma unroll 2
  for (int i = 0; i < parts; ++i) {
    const float* part = p.sums + (i * p.batch + b) * kQuerySums;
    all.a += part[lane];
    all.b += part[lane + 32];
    all.square += part[kDirections];
  }
  return all;
}

}  // namespace grace::cuda
