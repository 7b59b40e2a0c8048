// The scan for many queries, fp16 and bf16: products on tensor cores, |x|^2 + |k|^2 - 2 x.k.
//
// A block takes 256 keys at a time, 32 per warp, against NT * 8 queries, 32 elements of all of them
// per stage of a ring in shared memory (cp.async). Keys are the M operand of mma.m16n8k16, queries
// N. Which of the 32 elements meets which position of the operands does not matter as long as it is
// the same for both, so a lane reads 16 neighbouring bytes of a row for two mma. Of the keys it
// reads what it has copied itself; queries are shared, hence one barrier per stage.
#pragma once

#include "lookup_answer.cuh"

namespace grace::cuda {

template <class T, int NT, int Stages, int Blocks>
struct TensorScan {
  static_assert(sizeof(T) == 2);
  static constexpr int kTiles = NT;  // of 8 queries
  static constexpr int kQueries = NT * 8;
  static constexpr int kStages = Stages;
  static constexpr int kBlocks = Blocks;  // per multiprocessor
  static constexpr int kRows = kWarps * 32;
  static constexpr int kElements = 32;  // per stage, 64 bytes of a row
  static constexpr int kKeyBytes = kRows * 64;
  static constexpr int kStageBytes = kKeyBytes + kQueries * 64;
  static constexpr int kScanBytes = kStages * kStageBytes;
  static_assert(kWarps * kQueries * sizeof(Found) <= kScanBytes);
};

// The sum of eight squares.
template <class T>
__device__ __forceinline__ float sum_of_squares(const uint4& v) {
  float x[8], sum = 0;
  widen_vector(v, x, T{});
#pragma unroll
  for (int i = 0; i < 8; ++i) sum = fmaf(x[i], x[i], sum);
  return sum;
}

// The sum over the four lanes that share a row.
__device__ __forceinline__ float sum_of_quad(float v) {
  v += shuffle_xor(v, 1);
  return v + shuffle_xor(v, 2);
}

__device__ __forceinline__ Found found_across(const Found& found, int mask) {
  return {shuffle_xor(found.lo1, mask),  shuffle_xor(found.lo2, mask),
          shuffle_xor(found.lo3, mask),  shuffle_xor(found.hi, mask),
          shuffle_xor(found.row1, mask), shuffle_xor(found.row2, mask)};
}

// Field by field: a choice between two structs would be one between two addresses.
__device__ __forceinline__ Found pick(bool first, const Found& a, const Found& b) {
  return {first ? a.lo1 : b.lo1, first ? a.lo2 : b.lo2,   first ? a.lo3 : b.lo3,
          first ? a.hi : b.hi,   first ? a.row1 : b.row1, first ? a.row2 : b.row2};
}

// Where the results of a tile of 32 rows by NT * 8 queries are in a warp. Lane 4 g + j has the sums
// of the rows m * 8 + g, m < 4, and the queries t * 8 + 2 j + h, t < NT, h < 2.
template <int NT>
struct TileSums {
  float dot[2][NT][4];  // [m / 2][t][m % 2 * 2 + h]
  float key_norm[4];    // of row m * 8 + g; NaN where the row holds one
  unsigned live;        // bit m
};

// Bounds of the squared distances of query t * 8 + 2 j + h to this lane's four rows.
template <int NT>
__device__ __forceinline__ Found bounds(const Problem& p, const TileSums<NT>& sums, int t, int h,
                                        float query_norm, int first_row) {
  Found found;
  found.clear();
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const float norms = query_norm + sums.key_norm[m];
    const float c = fmaf(-2.0f, sums.dot[m / 2][t][m % 2 * 2 + h], norms);
    const float e = fmaf(norms, p.relative, p.absolute);
    const bool finite = fabsf(c) < infinity() && e < infinity();
    // Out: a dead row, or a NaN, which counts as +inf. Undecided: anything else that overflowed.
    const bool out = !(sums.live >> m & 1) || is_nan(sums.key_norm[m]);
    const float lo = out ? infinity() : finite ? c - e : -infinity();
    const float hi = !out && finite ? c + e : infinity();
    found.take(lo, first_row + m * 8);
    found.hi = fminf(found.hi, hi);
  }
  return found;
}

// Bring together what the eight lanes of a column found in their rows, halving the queries that a
// lane is responsible for at each step while there are more than two: in the end lane 4 g + j has
// query g * 8 + 2 j + h (NT = 8) or 2 j + h (NT = 1). Recursive, so that nothing is indexed at run
// time and few queries are on their way at once.
template <int NT, int Width, int Mask, int V>
__device__ __forceinline__ Found collect(const Problem& p, const TileSums<NT>& sums,
                                         const float* query_norms, int first_row) {
  if constexpr (Mask == 32) {
    const int column = lane_id() % 4 * 2 + V % 2;
    return bounds<NT>(p, sums, V / 2, V % 2, query_norms[V / 2 * 8 + column], first_row);
  } else if constexpr (Width * 2 <= NT * 2) {
    const Found low = collect<NT, Width * 2, Mask * 2, V>(p, sums, query_norms, first_row);
    const Found high = collect<NT, Width * 2, Mask * 2, V + Width>(p, sums, query_norms, first_row);
    const bool upper = lane_id() & Mask;
    Found keep = pick(upper, high, low);
    keep.merge(found_across(pick(upper, low, high), Mask));
    return keep;
  } else {
    Found keep = collect<NT, Width, Mask * 2, V>(p, sums, query_norms, first_row);
    keep.merge(found_across(keep, Mask));
    return keep;
  }
}

// Scan a slice; what is found belongs to this lane's two queries, see collect().
template <class T, class Shape, bool Aligned>
__device__ __forceinline__ void tensor_scan(const Problem& p, const Slice& slice,
                                            int64_t first_query, char* memory, float* query_norms,
                                            Found (&found)[2], float& largest) {
  constexpr int kTiles = Shape::kTiles, kStages = Shape::kStages, kElements = Shape::kElements;
  constexpr int kRows = Shape::kRows, kQueries = Shape::kQueries;
  const int lane = lane_id(), warp = warp_id();
  const int64_t queries_left = p.batch - first_query;
  // Of 8 queries, in use.
  const int tiles = queries_left < kQueries ? static_cast<int>(queries_left + 7) / 8 : kTiles;

  // This thread copies 16 bytes of one query per stage, zeros for one that does not ask.
  const bool copies_query = threadIdx.x < kQueries * 4;
  const char* my_query = nullptr;
  if (copies_query) {
    const T* query = query_of<T>(p, first_query + threadIdx.x / 4);
    if (query != nullptr) my_query = reinterpret_cast<const char*>(query) + lane % 4 * 16;
  }

  const int rows = static_cast<int>(slice.end - slice.begin);
  const int row_bytes = p.dim * 2;
  const int steps = p.dim > kElements ? (p.dim + kElements - 1) / kElements : 1;
  const int64_t eight_rows = p.key_stride * 16;  // in bytes
  const int64_t next_rows = p.key_stride * 2 * kRows - static_cast<int64_t>(steps) * 64;
  int fill_row = warp * 32 + lane / 4, fill_base = 0, fill_step = 0, fill_stage = 0;
  const char* fill_from = static_cast<const char*>(p.keys) +
                          (slice.begin + fill_row) * p.key_stride * 2 + lane % 4 * 16;
  const auto fill = [&] {
    if (fill_base < rows) {
      char* to = memory + fill_stage * Shape::kStageBytes;
      const int left = row_bytes - (fill_step * 64 + lane % 4 * 16);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        char* here = to + warp * 2048 + m * 512 + lane * 16;
        if (left > 0 && fill_row + m * 8 < rows) {
          copy_vector<T>(here, fill_from + m * eight_rows, left, Aligned);
        } else {
          copy_zeros(here);
        }
      }
      if (copies_query) {
        char* here = to + Shape::kKeyBytes + threadIdx.x * 16;
        if (left > 0 && my_query != nullptr) {
          copy_vector<T>(here, my_query + fill_step * 64, left, Aligned);
        } else {
          copy_zeros(here);
        }
      }
      fill_from += 64;
      fill_stage = fill_stage + 1 < kStages ? fill_stage + 1 : 0;
      if (++fill_step == steps) {
        fill_step = 0;
        fill_base += kRows;
        fill_row += kRows;
        fill_from += next_rows;
      }
    }
    commit_copies();
  };
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) fill();

  int stage = 0;
  float query_norm = 0;  // lane 4 g + j of warp t < kTiles: a share of |x|^2 of query t * 8 + g

#pragma unroll 1
  for (int base = 0; base < rows; base += kRows) {
    TileSums<kTiles> sums;
    const int my_row = base + warp * 32 + lane / 4;
    float radius[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int row = my_row + m * 8;
      radius[m] = row < rows ? radius_of(p, slice.begin + row) : -infinity();
      sums.key_norm[m] = 0;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int r = 0; r < 4; ++r) sums.dot[i][t][r] = 0;
      }
    }
    const bool first_tile = base == 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      wait_for_copies<kStages - 2>();
      __syncthreads();  // all have copied this stage, and all have read the one before
      fill();
      const char* here = memory + stage * Shape::kStageBytes;
      stage = stage + 1 < kStages ? stage + 1 : 0;
      uint4 a[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        a[m] = *reinterpret_cast<const uint4*>(here + warp * 2048 + m * 512 + lane * 16);
        sums.key_norm[m] += sum_of_squares<T>(a[m]);
      }
      if (first_tile && warp < kTiles) {
        query_norm += sum_of_squares<T>(
            *reinterpret_cast<const uint4*>(here + Shape::kKeyBytes + warp * 512 + lane * 16));
      }
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        if (t >= tiles) continue;
        const uint4 b =
            *reinterpret_cast<const uint4*>(here + Shape::kKeyBytes + t * 512 + lane * 16);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float d[4] = {0, 0, 0, 0};  // tensor cores add less exactly the more is there already
          mma(T{}, d, a[2 * i].x, a[2 * i + 1].x, a[2 * i].y, a[2 * i + 1].y, b.x, b.y);
          mma(T{}, d, a[2 * i].z, a[2 * i + 1].z, a[2 * i].w, a[2 * i + 1].w, b.z, b.w);
#pragma unroll
          for (int r = 0; r < 4; ++r) sums.dot[i][t][r] += d[r];
        }
      }
    }
    if (first_tile) {
      query_norm = sum_of_quad(query_norm);
      if (warp < kTiles && lane % 4 == 0) query_norms[warp * 8 + lane / 4] = query_norm;
      __syncthreads();
    }
    sums.live = 0;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      sums.key_norm[m] = sum_of_quad(sums.key_norm[m]);
      sums.live |= static_cast<unsigned>(radius[m] != -infinity()) << m;
      largest = fmaxf(largest, radius[m]);  // a NaN is no maximum
    }
    found[0].merge(collect<kTiles, 2, 4, 0>(p, sums, query_norms, my_row));
    found[1].merge(collect<kTiles, 2, 4, 1>(p, sums, query_norms, my_row));
  }
  wait_for_copies<0>();
}

template <class T, class Shape>
__device__ __forceinline__ void tensor_lookup(const Problem& p) {
  constexpr int kQueries = Shape::kQueries;
  char* memory = dynamic_shared();
  Shared<kQueries>& shared = *reinterpret_cast<Shared<kQueries>*>(memory + Shape::kScanBytes);
  const Slice slice = slice_of(p);
  const int64_t first_query = static_cast<int64_t>(blockIdx.y) * kQueries;
  Found found[2];
  found[0].clear();
  found[1].clear();
  float largest = -infinity();
  if (p.keys_aligned && p.source_aligned) {
    tensor_scan<T, Shape, true>(p, slice, first_query, memory, shared.query_norm, found, largest);
  } else {
    tensor_scan<T, Shape, false>(p, slice, first_query, memory, shared.query_norm, found, largest);
  }

  __syncthreads();  // the ring becomes the records of what was found
  const int lane = lane_id(), warp = warp_id();
  Found* records = reinterpret_cast<Found*>(memory);
  if (lane * 2 < kQueries) {
    records[(2 * lane) * kWarps + warp] = found[0];
    records[(2 * lane + 1) * kWarps + warp] = found[1];
  }
  __syncthreads();
  answer<T, kQueries>(p, slice, {kWarps, 32, Shape::kRows}, records, largest, memory, shared);
}

}  // namespace grace::cuda
