// The scan for one query, for few queries of few keys, and for fp32: direct differences on CUDA
// cores.
//
// A warp takes R keys at a time (slots of a slice go round the warps) against Q queries, 16 bytes
// per lane and key. Every lane copies what it will read itself into a ring of its own in shared
// memory (cp.async), 7 KB ahead per warp, 112 KB per multiprocessor, whatever the width of a key
// is: keys follow one another in the ring without a gap. Queries are read through L1, which keys
// bypass.
#pragma once

#include "lookup_answer.cuh"

namespace grace::cuda {

template <class T, int Q, int R>
struct DirectScan {
  static constexpr int kQueries = Q;
  static constexpr int kStageBytes = R * 512;  // of one warp
  static constexpr int kStages = 8192 / kStageBytes;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kScanBytes = kWarps * kRingBytes;
  static constexpr int kBlocks = 2;  // per multiprocessor
  static constexpr int kValues = Q * R;
  static constexpr int kGroups = kWarps * R;
  static_assert(kRingBytes == 8192 && kValues <= 32 && kGroups <= kMaxGroups);
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

// Scan a slice with queries of which at least one asks. What is found belongs to this lane's share:
// query value / R, key value % R of its warp's keys, value = lane / (32 / (Q * R)).
template <class T, int Q, int R, bool Aligned>
__device__ __forceinline__ void direct_scan(const Problem& p, const Slice& slice,
                                            const T* const (&query)[Q], char* memory, Found& found,
                                            float& largest) {
  using Shape = DirectScan<T, Q, R>;
  const int lane = lane_id(), warp = warp_id();
  const int value = lane / (32 / Shape::kValues);
  const int slots = static_cast<int>(slice.end - slice.begin);
  const int key_bytes = p.dim * static_cast<int>(sizeof(T));
  const int chunks = key_bytes > 512 ? (key_bytes + 511) / 512 : 1;  // what a warp takes at a time
  char* const ring = memory + warp * Shape::kRingBytes + lane * 16;

  const int64_t key_step = p.key_stride * static_cast<int64_t>(sizeof(T));
  const int64_t next_keys = key_step * Shape::kGroups - static_cast<int64_t>(chunks) * 512;
  const char* fill_from =
      static_cast<const char*>(p.keys) + (slice.begin + warp) * key_step + lane * 16;
  int fill_place = warp, fill_chunk = 0, fill_at = 0;
  const auto fill = [&] {
    if (fill_place < slots) {
      const int left = key_bytes - (fill_chunk * 512 + lane * 16);
      if (left > 0) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
          if (fill_place + r * kWarps >= slots) break;
          copy_vector<T>(ring + fill_at + r * 512, fill_from + r * kWarps * key_step, left,
                         Aligned);
        }
      }
      fill_at = (fill_at + Shape::kStageBytes) % Shape::kRingBytes;
      fill_from += 512;
      if (++fill_chunk == chunks) {
        fill_chunk = 0;
        fill_place += Shape::kGroups;
        fill_from += next_keys;
      }
    }
    commit_copies();
  };
#pragma unroll 1
  for (int i = 0; i < Shape::kStages - 1; ++i) fill();

  int read_at = 0;
#pragma unroll 1
  for (int place = warp; place < slots; place += Shape::kGroups) {
    const int my_place = place + value % R * kWarps;
    const float radius = my_place < slots ? radius_of(p, slice.begin + my_place) : -infinity();
    float sums[Shape::kValues];
#pragma unroll
    for (int v = 0; v < Shape::kValues; ++v) sums[v] = 0;
#pragma unroll 1
    for (int at = lane * 16, chunk = 0; chunk < chunks; at += 512, ++chunk) {
      fill();  // into the stage that was read last
      wait_for_copies<Shape::kStages - 1>();
      if (at < key_bytes) {
        float k[R][kVector<T>];
#pragma unroll
        for (int r = 0; r < R; ++r) {
          // Behind the last key is what an earlier one left.
          widen_vector(*reinterpret_cast<const uint4*>(ring + read_at + r * 512), k[r], T{});
        }
#pragma unroll
        for (int q = 0; q < Q; ++q) {
          float x[kVector<T>];
          const char* from = reinterpret_cast<const char*>(query[q]) + at;
          widen_vector(load_vector<T>(from, key_bytes - at, Aligned), x, T{});
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
      read_at = (read_at + Shape::kStageBytes) % Shape::kRingBytes;
    }
    const float c = sum_of_warp<Shape::kValues, 16>(sums);
    if (radius == -infinity()) continue;
    largest = fmaxf(largest, radius);  // a NaN is no maximum
    // A NaN is a NaN canonically too, and counts as +inf: out. An overflow may be less than +inf.
    if (is_nan(c)) continue;
    const float e = fmaf(c, p.relative, p.absolute);
    found.take(c < infinity() ? c - e : 0x1p127f, my_place);
    found.hi = fminf(found.hi, c + e);
  }
  wait_for_copies<0>();
}

// Scan a slice and resolve its queries; returns the largest radius that this thread has read.
template <class T, int Q, int R>
__device__ __forceinline__ float direct_lookup(const Problem& p, const Slice& slice) {
  using Shape = DirectScan<T, Q, R>;
  char* memory = dynamic_shared();

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
  Found found;
  found.clear();
  float largest = -infinity();
  if (asking == nullptr) {
    // Nothing to scan.
  } else if (p.keys_aligned && p.source_aligned) {
    direct_scan<T, Q, R, true>(p, slice, query, memory, found, largest);
  } else {
    direct_scan<T, Q, R, false>(p, slice, query, memory, found, largest);
  }

  __syncthreads();                              // the rings become the records of what was found
  constexpr int kCopies = 32 / Shape::kValues;  // lanes that hold the same
  const int lane = lane_id(), value = lane / kCopies;
  Found* records = reinterpret_cast<Found*>(memory);
  if (lane % kCopies == 0) {
    records[value / R * Shape::kGroups + value % R * kWarps + warp_id()] = found;
  }
  __syncthreads();
  resolve_all<T, Q>(p, slice, {Shape::kGroups, 1, Shape::kGroups}, records);
  return largest;
}

}  // namespace grace::cuda
