// The scan for many queries, fp16 and bf16: products on tensor cores, |x|^2 + |k|^2 - 2 x.k.
//
// A block takes 256 keys at a time, 32 per warp, against MT * 16 queries, 32 elements of all of
// them per stage of a ring in shared memory (cp.async). Queries are the M operand of mma.m16n8k16,
// keys N: operands then come from shared memory as they are used, one ldmatrix for two mma. The
// four 16-byte parts of a row are swapped by its number, so that eight rows meet all banks. Rows
// must be aligned.
#pragma once

#include "lookup_answer.cuh"

namespace grace::cuda {

template <class T, int MT, int Stages, int Blocks>
struct TensorScan {
  static_assert(sizeof(T) == 2 && Stages >= 2);
  static constexpr int kTiles = MT;  // of 16 queries
  static constexpr int kQueries = MT * 16;
  static constexpr int kStages = Stages;
  static constexpr int kBlocks = Blocks;  // per multiprocessor
  static constexpr int kKeys = kWarps * 32;
  static constexpr int kElements = 32;  // per stage, 64 bytes of a row
  static constexpr int kKeyBytes = kKeys * 64;
  static constexpr int kStageBytes = kKeyBytes + kQueries * 64;
  static constexpr int kScanBytes = kStages * kStageBytes;
  static_assert(kWarps * kQueries * sizeof(Found) <= kScanBytes);
  static_assert(kTiles <= kWarps);
};

// Where part `part` of row `row` is in a tile of rows of 64 bytes.
__device__ __forceinline__ int swapped(int row, int part) {
  return row * 64 + (part ^ (row / 2 % 4)) * 16;
}

// The sum of eight squares.
template <class T>
__device__ __forceinline__ float sum_of_squares(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  float x[8], sum = 0;
  widen_vector(uint4{a, b, c, d}, x, T{});
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
  return {shuffle_xor(found.lo1, mask),    shuffle_xor(found.lo2, mask),
          shuffle_xor(found.lo3, mask),    shuffle_xor(found.hi, mask),
          shuffle_xor(found.place1, mask), shuffle_xor(found.place2, mask)};
}

// Field by field: a choice between two structs would be one between two addresses.
__device__ __forceinline__ Found pick(bool first, const Found& a, const Found& b) {
  return {first ? a.lo1 : b.lo1, first ? a.lo2 : b.lo2,       first ? a.lo3 : b.lo3,
          first ? a.hi : b.hi,   first ? a.place1 : b.place1, first ? a.place2 : b.place2};
}

// Bounds of a squared distance, of a slot that is not out.
__device__ __forceinline__ void take_bounds(const Problem& p, Found& found, float dot,
                                            float query_norm, float key_norm, bool out, int place) {
  const float norms = query_norm + key_norm;
  const float c = fmaf(-2.0f, dot, norms);
  const float e = fmaf(norms, p.relative, p.absolute);
  const bool finite = fabsf(c) < infinity() && e < infinity();  // otherwise undecided
  const float lo = out ? infinity() : finite ? c - e : -infinity();
  const float hi = !out && finite ? c + e : infinity();
  found.take(lo, place);
  found.hi = fminf(found.hi, hi);
}

// The results of 32 keys and MT * 16 queries in a warp. Lane 4 g + j has the products of the
// queries t * 16 + half * 8 + g and the keys m * 8 + 2 j + h, t < MT, m < 4, half and h < 2.
template <int MT>
struct TileSums {
  float dot[MT][4][4];   // [t][m][half * 2 + h]
  float key_norm[4][2];  // [m][h]; NaN where the key holds one
  unsigned live;         // bit m * 2 + h
};

// Bounds of the squared distances of one query to this lane's eight keys.
template <int MT, int V>
__device__ __forceinline__ Found bounds(const Problem& p, const TileSums<MT>& sums,
                                        float query_norm, int first_place) {
  Found found;
  found.clear();
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // Out: a dead slot, or a NaN, which counts as +inf.
      const bool out = !(sums.live >> (m * 2 + h) & 1) || is_nan(sums.key_norm[m][h]);
      take_bounds(p, found, sums.dot[V / 2][m][V % 2 * 2 + h], query_norm, sums.key_norm[m][h], out,
                  first_place + m * 8 + h);
    }
  }
  return found;
}

// Bring together what the four lanes of a query found in their keys. Value V is query V / 2 * 16 +
// V % 2 * 8 + g. While there are more than two, a step halves those that a lane is responsible for:
// in the end lane 4 g + j has value v < 2 of j * 16 + v * 8 + g (MT = 4) or v * 8 + g (MT = 1).
// Recursive, so that nothing is indexed at run time and few are on their way at once.
template <int MT, int Width, int Mask, int V>
__device__ __forceinline__ Found collect(const Problem& p, const TileSums<MT>& sums,
                                         const float* query_norms, int first_place) {
  if constexpr (Mask == 4) {
    return bounds<MT, V>(p, sums, query_norms[V / 2 * 16 + V % 2 * 8 + lane_id() / 4], first_place);
  } else if constexpr (Width * 2 <= MT * 2) {
    const Found low = collect<MT, Width * 2, Mask * 2, V>(p, sums, query_norms, first_place);
    const Found high =
        collect<MT, Width * 2, Mask * 2, V + Width>(p, sums, query_norms, first_place);
    const bool upper = lane_id() & Mask;
    Found keep = pick(upper, high, low);
    keep.merge(found_across(pick(upper, low, high), Mask));
    return keep;
  } else {
    Found keep = collect<MT, Width, Mask * 2, V>(p, sums, query_norms, first_place);
    keep.merge(found_across(keep, Mask));
    return keep;
  }
}

// Scan a slice; what is found belongs to this lane's two queries, see collect().
template <class T, class Shape>
__device__ __forceinline__ void tensor_scan(const Problem& p, const Slice& slice,
                                            int64_t first_query, char* memory, float* query_norms,
                                            Found (&found)[2], float& largest) {
  constexpr int kTiles = Shape::kTiles, kStages = Shape::kStages, kElements = Shape::kElements;
  constexpr int kKeys = Shape::kKeys, kQueries = Shape::kQueries;
  const int lane = lane_id(), warp = warp_id();
  const int64_t queries_left = p.batch - first_query;
  // Of 16 queries, in use.
  const int tiles = queries_left < kQueries ? static_cast<int>(queries_left + 15) / 16 : kTiles;

  // This thread copies 16 bytes of one query per stage, zeros for one that does not ask.
  const bool copies_query = threadIdx.x < kQueries * 4;
  const char* my_query = nullptr;
  if (copies_query) {
    const T* query = query_of<T>(p, first_query + threadIdx.x / 4);
    if (query != nullptr) my_query = reinterpret_cast<const char*>(query) + lane % 4 * 16;
  }

  const int slots = static_cast<int>(slice.end - slice.begin);
  const int key_bytes = p.dim * 2;
  const int steps = p.dim > kElements ? (p.dim + kElements - 1) / kElements : 1;
  const int64_t eight_keys = p.key_stride * 16;  // in bytes
  const int64_t next_keys = p.key_stride * 2 * kKeys - static_cast<int64_t>(steps) * 64;
  int fill_place = warp * 32 + lane / 4, fill_base = 0, fill_step = 0, fill_stage = 0;
  const char* fill_from = static_cast<const char*>(p.keys) +
                          (slice.begin + fill_place) * p.key_stride * 2 + lane % 4 * 16;
  const auto fill = [&] {
    if (fill_base < slots) {
      char* to = memory + fill_stage * Shape::kStageBytes;
      const bool within = fill_step * 64 + lane % 4 * 16 < key_bytes;
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        char* here = to + warp * 2048 + m * 512 + swapped(lane / 4, lane % 4);
        if (within && fill_place + m * 8 < slots) {
          copy16(here, fill_from + m * eight_keys);
        } else {
          copy_zeros(here);
        }
      }
      if (copies_query) {
        char* here = to + Shape::kKeyBytes + swapped(threadIdx.x / 4, lane % 4);
        if (within && my_query != nullptr) {
          copy16(here, my_query + fill_step * 64);
        } else {
          copy_zeros(here);
        }
      }
      fill_from += 64;
      fill_stage = fill_stage + 1 < kStages ? fill_stage + 1 : 0;
      if (++fill_step == steps) {
        fill_step = 0;
        fill_base += kKeys;
        fill_place += kKeys;
        fill_from += next_keys;
      }
    }
    commit_copies();
  };
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) fill();

  // Where this lane finds the row that it names to ldmatrix: keys, four parts of 8 rows; queries,
  // two parts of 16 rows.
  const int key_at = warp * 2048 + swapped(lane % 8, lane / 8);
  const int query_at = Shape::kKeyBytes + swapped(lane % 16, lane / 16);
  int stage = 0;
  float query_norm[2] = {0, 0};  // lane 4 g + j of warp t: shares of |x|^2, query t * 16 + 8 i + g

#pragma unroll 1
  for (int base = 0; base < slots; base += kKeys) {
    TileSums<kTiles> sums;
    const int tile_place = base + warp * 32;
    float key_norm[4], radius[4];  // of key m * 8 + g
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int place = tile_place + m * 8 + lane / 4;
      radius[m] = place < slots ? radius_of(p, slice.begin + place) : -infinity();
      key_norm[m] = 0;
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int r = 0; r < 4; ++r) sums.dot[t][m][r] = 0;
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
      uint32_t b[4][4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        load_matrices(here + key_at + m * 512, b[m]);
        key_norm[m] += sum_of_squares<T>(b[m][0], b[m][1], b[m][2], b[m][3]);
      }
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        if (t >= tiles) continue;
        uint32_t a[2][4];
        load_matrices(here + query_at + t * 1024, a[0]);
        load_matrices(here + (query_at ^ 32) + t * 1024, a[1]);
        if (first_tile && warp == t) {
          query_norm[0] += sum_of_squares<T>(a[0][0], a[0][2], a[1][0], a[1][2]);
          query_norm[1] += sum_of_squares<T>(a[0][1], a[0][3], a[1][1], a[1][3]);
        }
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          float d[4] = {0, 0, 0, 0};  // tensor cores add less exactly the more is there already
          mma(T{}, d, a[0], b[m][0], b[m][1]);
          mma(T{}, d, a[1], b[m][2], b[m][3]);
#pragma unroll
          for (int r = 0; r < 4; ++r) sums.dot[t][m][r] += d[r];
        }
      }
    }
    if (first_tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float norm = sum_of_quad(query_norm[i]);
        if (warp < kTiles && lane % 4 == 0) query_norms[warp * 16 + i * 8 + lane / 4] = norm;
      }
      __syncthreads();
    }
    sums.live = 0;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      largest = fmaxf(largest, radius[m]);  // a NaN is no maximum
      const float norm = sum_of_quad(key_norm[m]);
      const unsigned live = ballot(radius[m] != -infinity());
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int from = lane % 4 * 8 + h * 4;  // has key m * 8 + 2 j + h
        sums.key_norm[m][h] = shuffle(norm, from);
        sums.live |= (live >> from & 1) << (m * 2 + h);
      }
    }
    const int first_place = tile_place + lane % 4 * 2;
    found[0].merge(collect<kTiles, 2, 1, 0>(p, sums, query_norms, first_place));
    found[1].merge(collect<kTiles, 2, 1, 1>(p, sums, query_norms, first_place));
  }
  wait_for_copies<0>();
}

// Scan a slice and resolve its queries; returns the largest radius that this thread has read.
template <class T, class Shape>
__device__ __forceinline__ float tensor_lookup(const Problem& p, const Slice& slice) {
  constexpr int kQueries = Shape::kQueries;
  char* memory = dynamic_shared();
  Shared<kQueries>& shared = *reinterpret_cast<Shared<kQueries>*>(memory + Shape::kScanBytes);
  const int64_t first_query = static_cast<int64_t>(blockIdx.y) * kQueries;
  Found found[2];
  found[0].clear();
  found[1].clear();
  float largest = -infinity();
  tensor_scan<T, Shape>(p, slice, first_query, memory, shared.query_norm, found, largest);

  __syncthreads();  // the ring becomes the records of what was found
  const int lane = lane_id(), warp = warp_id();
  Found* records = reinterpret_cast<Found*>(memory);
  const int first = Shape::kTiles > 1 ? lane % 4 * 16 : 0;
  if (Shape::kTiles > 1 || lane % 4 == 0) {
    records[(first + lane / 4) * kWarps + warp] = found[0];
    records[(first + 8 + lane / 4) * kWarps + warp] = found[1];
  }
  __syncthreads();
  resolve_all<T, kQueries>(p, slice, {kWarps, 32, Shape::kKeys}, records);
  return largest;
}

}  // namespace grace::cuda
