// The scan where fp64 is cheap: the canonical distance of every key, from the start.
//
//   s(x, k) = round_to_fp32( sum_i (x_i - k_i)^2 )   in fp64, in the canonical order
//
// There is no margin, nothing is scored twice, and what a slice knows is final: the last block
// compares one number per slice. Tiling: as the scan on CUDA cores, a warp per key row, R rows at a
// time against Q queries; keys come through a ring of 8 KB per warp, queries through L1. Aligned
// rows only. Bytes read: as there. Per element, query and key three fp64 instructions, of which a
// multiprocessor with cheap fp64 issues 64 a clock, and a conversion per element of a row, 16 a
// clock: with one query of 16-bit keys about half of what the memory takes. Counted, not measured.
#pragma once

#include "lookup_answer.cuh"
#include "lookup_chunks.cuh"

namespace grace::cuda {

template <class T, int Q, int R>
struct ExactScan {
  static constexpr int kQueries = Q;
  static constexpr int kStageBytes = R * Chunk<T>::kBytes;  // of one warp
  static constexpr int kStages = 8192 / kStageBytes;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kScanBytes = kWarps * kRingBytes;
  static constexpr int kBlocks = 2;  // per multiprocessor
  static constexpr int kValues = Q * R;
  static constexpr int kGroups = kWarps * R;
  static_assert(R == 2);  // a group has R keys, or at the end of a slice one
  static_assert(kRingBytes == 8192 && kStages >= 4 && kValues <= 32 && kGroups <= 32);
};

template <int R>
struct Rows {
  static constexpr int value = R;
};

// The nearest live slot so far of a query among those of this lane, which come in ascending order.
struct Nearest {
  float s;
  int place;     // in the slice; -1: none
  float radius;  // the slot's
  int unused;

  __device__ __forceinline__ void take(float other, int other_place, float other_radius) {
    if (is_nan(other)) other = infinity();
    if (place >= 0 && !(other < s)) return;
    s = other;
    place = other_place;
    radius = other_radius;
  }
};

// Scan a slice. What is found belongs to this lane's share: query value / R, key value % R of its
// warp's keys, value = lane / (32 / (Q * R)).
template <class T, int Q, int R>
__device__ __forceinline__ Nearest exact_scan(const Problem& p, const Slice& slice,
                                              const T* const (&query)[Q], char* memory) {
  using Shape = ExactScan<T, Q, R>;
  const int lane = lane_id(), warp = warp_id();
  const int value = lane / (32 / Shape::kValues);
  const int slots = static_cast<int>(slice.end - slice.begin);
  const int row_bytes = p.dim * static_cast<int>(sizeof(T));
  const int chunks = chunks_of<T>(p);
  char* const ring = memory + warp * Shape::kRingBytes;

  const int64_t key_step = p.key_stride * static_cast<int64_t>(sizeof(T));
  const int64_t next_keys = key_step * Shape::kGroups - int64_t{chunks} * Chunk<T>::kBytes;
  const char* fill_from = static_cast<const char*>(p.keys) + (slice.begin + warp) * key_step;
  int fill_place = warp, fill_chunk = 0, fill_at = 0;
  const auto fill = [&] {
    if (fill_place < slots) {
      const int left = row_bytes - fill_chunk * Chunk<T>::kBytes;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (fill_place + r * kWarps >= slots) break;
        copy_chunk<T>(ring + fill_at + r * Chunk<T>::kBytes, fill_from + r * kWarps * key_step,
                      left);
      }
      fill_at = (fill_at + Shape::kStageBytes) % Shape::kRingBytes;
      fill_from += Chunk<T>::kBytes;
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

  Nearest nearest = {infinity(), -1, 0, 0};
  int read_at = 0;
#pragma unroll 1
  for (int place = warp; place < slots; place += Shape::kGroups) {
    const int my_place = place + value % R * kWarps;
    const float radius = my_place < slots ? radius_of(p, slice.begin + my_place) : -infinity();
    double sums[Shape::kValues];
#pragma unroll
    for (int v = 0; v < Shape::kValues; ++v) sums[v] = 0;
    const auto add_up = [&](auto rows) {
      constexpr int kRows = decltype(rows)::value;
#pragma unroll 1
      for (int left = row_bytes, chunk = 0; chunk < chunks; left -= Chunk<T>::kBytes, ++chunk) {
        wait_for_copies<Shape::kStages - 2>();
        if constexpr (Chunk<T>::kShared) converge();  // all have copied this one, and read the last
        fill();
        double k[kRows][8];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          read_chunk<T>(ring + read_at + r * Chunk<T>::kBytes, left, k[r]);
        }
#pragma unroll
        for (int q = 0; q < Q; ++q) {
          float run[8];
          double x[8];
          load_run<T>(query[q], p.dim - left / static_cast<int>(sizeof(T)) + lane * 8, p.dim, true,
                      run);
#pragma unroll
          for (int i = 0; i < 8; ++i) x[i] = static_cast<double>(run[i]);
#pragma unroll
          for (int r = 0; r < kRows; ++r) sums[q * R + r] = add_squares(sums[q * R + r], x, k[r]);
        }
        read_at = (read_at + Shape::kStageBytes) % Shape::kRingBytes;
      }
    };
    // Few keys are often one to a warp: the rest of a group then costs nothing.
    if (place + (R - 1) * kWarps < slots) {
      add_up(Rows<R>{});
    } else {
      add_up(Rows<1>{});
    }
    const float s = __double2float_rn(fold_of_warp<Shape::kValues, 16>(sums));
    if (radius != -infinity()) nearest.take(s, my_place, radius);
  }
  wait_for_copies<0>();
  return nearest;
}

// What the slices know of query q of this block's, one after the other. Of a Partial `lo` is s and
// `hi` the radius of the slot.
template <int Q>
__device__ __forceinline__ Partial* exact_partials(const Problem& p, int q) {
  const int64_t slices = gridDim.x;
  return static_cast<Partial*>(p.partials) + (blockIdx.y * int64_t{Q} + q) * slices;
}

// One warp, the last block: the partials of all slices -> index and distance of query q.
template <class T, int Q>
__device__ __forceinline__ void answer_exactly(const Problem& p, int q, Shared<Q>& shared) {
  const int64_t b = static_cast<int64_t>(blockIdx.y) * Q + q;
  if (b >= p.batch) return;
  const T* query = query_of<T>(p, b);
  const int slices = gridDim.x;
  const Partial* partials = exact_partials<Q>(p, q);
  Best best = {infinity(), -1};
  float radius = 0;
#pragma unroll 4
  for (int i = lane_id(); i < slices; i += 32) {
    if (query == nullptr) break;
    const uint4 words = load16_of_others(partials + i);
    const int64_t slot =
        static_cast<int64_t>(static_cast<uint64_t>(words.w) << 32 | static_cast<uint64_t>(words.z));
    if (slot < 0) continue;
    best.take(__uint_as_float(words.x), slot);
    if (best.slot == slot) radius = __uint_as_float(words.y);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const float s = shuffle_xor(best.s, mask), other_radius = shuffle_xor(radius, mask);
    const int64_t slot = shuffle_xor(best.slot, mask);
    if (slot < 0) continue;
    best.take(s, slot);
    if (best.slot == slot) radius = other_radius;
  }
  // Every s of a query with a NaN is +inf here; canonically it has no nearest slot.
  if (best.slot >= 0 && best.s == infinity() && holds_nan(p, query)) best.slot = -1;
  if (lane_id() != 0) return;
  const float d = __fsqrt_rn(best.s);
  const bool hit = best.slot >= 0 && (!p.bounded || d <= radius);
  shared.hit[q] = hit ? best.slot : -1;
  p.index[b] = hit ? best.slot : -1;
  p.distance[b] = hit ? d : infinity();
}

template <class T, int Q, int R>
__device__ __forceinline__ void exact_lookup(const Problem& p, const Slice& slice,
                                             Shared<Q>& shared) {
  using Shape = ExactScan<T, Q, R>;
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
  Nearest nearest = {infinity(), -1, 0, 0};
  if (asking != nullptr) nearest = exact_scan<T, Q, R>(p, slice, query, memory);

  __syncthreads();                              // the rings become the records of what was found
  constexpr int kCopies = 32 / Shape::kValues;  // lanes that hold the same
  const int lane = lane_id(), value = lane / kCopies;
  Nearest* records = reinterpret_cast<Nearest*>(memory);
  if (lane % kCopies == 0) {
    records[value / R * Shape::kGroups + value % R * kWarps + warp_id()] = nearest;
  }
  __syncthreads();
  if (threadIdx.x < Q) {
    const Nearest* mine = records + threadIdx.x * Shape::kGroups;
    Nearest least = mine[0];
#pragma unroll 4
    for (int i = 1; i < Shape::kGroups; ++i) {
      const Nearest other = mine[i];
      const bool nearer = other.place >= 0 && (least.place < 0 || other.s < least.s ||
                                               (other.s == least.s && other.place < least.place));
      if (nearer) least = other;
    }
    const int64_t slot = least.place < 0 ? -1 : slice.begin + least.place;
    exact_partials<Q>(p, threadIdx.x)[blockIdx.x] = {least.s, least.radius, slot};
  }
  if (!arrive_last(p.tickets + blockIdx.y, &shared.arrived)) return;
  for (int q = threadIdx.x; q < Q; q += kThreads) shared.hit[q] = -1;
  __syncthreads();
  for (int q = warp_id(); q < Q; q += kWarps) answer_exactly<T, Q>(p, q, shared);
  if (p.hidden == nullptr) return;
  __syncthreads();
  write_hits<Q>(p, static_cast<int64_t>(blockIdx.y) * Q, shared);
}

}  // namespace grace::cuda
