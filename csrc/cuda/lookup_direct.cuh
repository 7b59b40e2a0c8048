// The scan for few queries and for fp32: direct differences on CUDA cores.
//
// A warp takes R neighbouring rows at a time against Q queries, 16 bytes per lane and row. Every
// lane copies what it will read itself into a ring of its own in shared memory (cp.async), 7.5 KB
// ahead per warp, 120 KB per multiprocessor, whatever the width of a row is: rows follow one
// another in the ring without a gap. Queries are read through L1, which keys bypass.
#pragma once

#include "lookup_answer.cuh"

namespace grace::cuda {

template <class T, int Q, int R>
struct DirectScan {
  static constexpr int kQueries = Q;
  static constexpr int kStages = 16 / R;
  static constexpr int kStageBytes = R * 512;  // of one warp
  static constexpr int kScanBytes = kWarps * kStages * kStageBytes;
  static constexpr int kBlocks = 2;  // per multiprocessor
  static constexpr int kValues = Q * R;
  static constexpr int kGroups = kWarps * R;
  static_assert(kValues <= 32 && kGroups <= kMaxGroups);
  static_assert(kGroups * Q * sizeof(Found) <= kScanBytes);
};

// Sums over a warp of V values per lane: lane l gets that of value l / (32 / V). Recursive, so that
// no value is indexed at run time.
template <int V, int Mask>
__device__ __forceinline__ float sum_of_warp(const float (&v)[V]) {
  if constexpr (V > 1) {
    const bool upper = lane_id() & Mask;
    float half[V / 2];
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      const float keep = upper ? v[i + V / 2] : v[i], send = upper ? v[i] : v[i + V / 2];
      half[i] = keep + shuffle_xor(send, Mask);
    }
    return sum_of_warp<V / 2, Mask / 2>(half);
  } else if constexpr (Mask > 0) {
    const float both[1] = {v[0] + shuffle_xor(v[0], Mask)};
    return sum_of_warp<1, Mask / 2>(both);
  } else {
    return v[0];
  }
}

template <class T, int Q, int R>
__device__ __forceinline__ void direct_lookup(const Problem& p) {
  using Shape = DirectScan<T, Q, R>;
  constexpr int kStages = Shape::kStages, kStageBytes = Shape::kStageBytes;
  constexpr int kChunk = 32 * kVector<T>;  // elements of a row that a warp takes at a time
  char* memory = dynamic_shared();
  Shared<Q>& shared = *reinterpret_cast<Shared<Q>*>(memory + Shape::kScanBytes);
  const int lane = lane_id(), warp = warp_id();
  const Slice slice = slice_of(p);

  const T* query[Q];
  const T* asking = nullptr;
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    query[q] = query_of<T>(p, static_cast<int64_t>(blockIdx.y) * Q + q);
    if (query[q] != nullptr) asking = query[q];
  }
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    if (query[q] == nullptr) query[q] = asking;  // its sums are not looked at
  }

  // This lane's share of the results: query value / R, row value % R of its warp's rows.
  const int value = lane / (32 / Shape::kValues);
  Found found;
  found.clear();
  float largest = -infinity();

  if (asking != nullptr) {
    const int chunks = p.dim > kChunk ? (p.dim + kChunk - 1) / kChunk : 1;
    const T* const keys = static_cast<const T*>(p.keys);
    char* const ring = memory + warp * kStages * kStageBytes + lane * 16;
    int64_t fill_row = slice.begin + warp * R;
    int fill_at = lane * kVector<T>, fill_stage = 0;
    const auto fill = [&] {
      if (fill_row < slice.end) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
          char* to = ring + fill_stage * kStageBytes + r * 512;
          const int64_t row = fill_row + r < slice.end ? fill_row + r : fill_row;
          copy_vector(to, keys + row * p.key_stride, fill_at, p.dim, p.keys_aligned);
        }
        fill_at += kChunk;
        if (fill_at >= chunks * kChunk) {
          fill_at = lane * kVector<T>;
          fill_row += kWarps * R;
        }
        fill_stage = fill_stage + 1 < kStages ? fill_stage + 1 : 0;
      }
      commit_copies();
    };
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) fill();

    int stage = 0;
#pragma unroll 1
    for (int64_t base = slice.begin + warp * R; base < slice.end; base += kWarps * R) {
      const int64_t row = base + value % R;
      const float radius = row < slice.end ? radius_of(p, row) : -infinity();
      float sums[Shape::kValues];
#pragma unroll
      for (int v = 0; v < Shape::kValues; ++v) sums[v] = 0;
#pragma unroll 1
      for (int at = lane * kVector<T>; at < chunks * kChunk; at += kChunk) {
        fill();  // into the stage that was read last
        wait_for_copies<kStages - 1>();
        float k[R][kVector<T>];
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const char* from = ring + stage * kStageBytes + r * 512;
          widen_vector(*reinterpret_cast<const uint4*>(from), k[r], T{});
        }
        stage = stage + 1 < kStages ? stage + 1 : 0;
#pragma unroll
        for (int q = 0; q < Q; ++q) {
          float x[kVector<T>];
          widen_vector(load_vector(query[q], at, p.dim, p.source_aligned), x, T{});
#pragma unroll
          for (int r = 0; r < R; ++r) {
#pragma unroll
            for (int i = 0; i < kVector<T>; ++i) {
              const float d = x[i] - k[r][i];
              sums[q * R + r] = fmaf(d, d, sums[q * R + r]);
            }
          }
        }
      }
      const float c = sum_of_warp<Shape::kValues, 16>(sums);
      if (radius == -infinity()) continue;
      largest = fmaxf(largest, radius);  // a NaN is no maximum
      // A NaN is a NaN canonically too, and counts as +inf: out. An overflow may be less than +inf.
      if (is_nan(c)) continue;
      const float e = fmaf(c, p.relative, p.absolute);
      found.take(c < infinity() ? c - e : 0x1p127f, static_cast<int>(row - slice.begin));
      found.hi = fminf(found.hi, c + e);
    }
    wait_for_copies<0>();
  }

  __syncthreads();                              // the rings become the records of what was found
  constexpr int kCopies = 32 / Shape::kValues;  // lanes that hold the same
  Found* records = reinterpret_cast<Found*>(memory);
  if (lane % kCopies == 0) {
    records[value / R * Shape::kGroups + warp * R + value % R] = found;
  }
  __syncthreads();
  answer<T, Q>(p, slice, {Shape::kGroups, 1, Shape::kGroups}, records, largest, memory, shared);
}

}  // namespace grace::cuda
