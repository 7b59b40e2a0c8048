// The sketches of a block's queries, and what they say of keys: phi(x) = (P (x - c), rho) with the
// error that computing it may have had, see sketch_margin() and grace_kernels/sketch_math.py.
//
// Products on tensor cores for every dtype: x - c in fp32, cut into two bfloat16. The warps share
// the elements of all queries, 32 at a time, and for more than 8 queries the directions besides;
// every lane loads 16 bytes of a direction, from L2 since every block does so, and nothing goes
// through shared memory before the warps' sums are added up there.
#pragma once

#include "lookup_tensor.cuh"

namespace grace::cuda {

// What a block knows of one query before it looks at keys.
struct alignas(16) Sketched {
  float residual_low, residual_high;  // less scales[kMiddle]
  float error;                        // of the coordinates, all together
  bool looks;                         // asks, and something may be in its reach
  float coordinates[kDirections];
};

// Of a block of Q queries: warps that share the directions, and warps that share the elements.
template <int Q>
struct Projection {
  static constexpr int kTiles = (Q + 15) / 16;  // of 16 queries
  static constexpr int kHalves = Q > 8 ? 2 : 1;
  static constexpr int kParts = Q > 8 ? 2 : 1;
  static constexpr int kTurns = kWarps / kParts;
  static constexpr int kSums = kDirections + 1;  // per query and turn, the last one of |y|^2
};

// Every warp's share of P y and |y|^2 of all queries, sums[turn][query][kSums], of the elements
// from..to-1.
template <class T, int Q>
__device__ __forceinline__ void project(const Problem& p, int64_t first_query, float* sums,
                                        int from, int to) {
  using Shape = Projection<Q>;
  constexpr int kTiles = Shape::kTiles, kHalves = Shape::kHalves, kSums = Shape::kSums;
  constexpr int kEights = kDirections / 8 / Shape::kParts;  // of directions
  const SketchView& sketch = p.sketch;
  // Only the tensor scan has so many queries, and aligned rows.
  const bool aligned = Q > 8 || sketch.aligned, query_aligned = Q > 8 || p.source_aligned;
  const int lane = lane_id();
  const int part = warp_id() % Shape::kParts, turn = warp_id() / Shape::kParts;
  const int first_direction = part * kEights * 8 + lane / 4;

  const T* query[kTiles][kHalves];
  float dot[kTiles][kEights][4], square[kTiles][kHalves];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < kHalves; ++i) {
      const int q = t * 16 + i * 8 + lane / 4;
      query[t][i] = q < Q ? query_of<T>(p, first_query + q) : nullptr;
      square[t][i] = 0;
    }
#pragma unroll
    for (int m = 0; m < kEights; ++m) {
#pragma unroll
      for (int r = 0; r < 4; ++r) dot[t][m][r] = 0;
    }
  }
#pragma unroll 1
  for (int base = from + turn * 32; base < to; base += Shape::kTurns * 32) {
    // The eight elements of a lane are columns 2 j, 2 j + 1, 2 j + 8 and 2 j + 9 of two steps.
    const int at = base + lane % 4 * 8;
    uint4 b[kEights];
#pragma unroll
    for (int m = 0; m < kEights; ++m) {
      const int64_t direction = first_direction + m * 8;
      b[m] = load_vector<BFloat>(sketch.directions + direction * p.dim + at, (p.dim - at) * 2,
                                 aligned);
    }
    float centre[8];
    load_run<float>(sketch.centre, at, p.dim, aligned, centre);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      uint32_t high[2][4] = {}, low[2][4] = {};
#pragma unroll
      for (int i = 0; i < kHalves; ++i) {
        if (query[t][i] == nullptr) continue;
        float y[8];
        load_run<T>(query[t][i], at, p.dim, query_aligned, y);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          y[e] -= centre[e];
          square[t][i] = fmaf(y[e], y[e], square[t][i]);
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const uint32_t both = round_to_bfloats(y[2 * e], y[2 * e + 1]);
          high[i][e] = both;
          low[i][e] = round_to_bfloats(y[2 * e] - __uint_as_float(both << 16),
                                       y[2 * e + 1] - __uint_as_float(both & 0xffff0000u));
        }
      }
      converge();  // mma is for whole warps, and not every lane had something to load
      const uint32_t low_first[4] = {low[0][0], low[1][0], low[0][1], low[1][1]};
      const uint32_t low_second[4] = {low[0][2], low[1][2], low[0][3], low[1][3]};
      const uint32_t high_first[4] = {high[0][0], high[1][0], high[0][1], high[1][1]};
      const uint32_t high_second[4] = {high[0][2], high[1][2], high[0][3], high[1][3]};
#pragma unroll
      for (int m = 0; m < kEights; ++m) {
        float d[4] = {0, 0, 0, 0};
        mma(BFloat{}, d, low_first, b[m].x, b[m].y);
        mma(BFloat{}, d, low_second, b[m].z, b[m].w);
        mma(BFloat{}, d, high_first, b[m].x, b[m].y);
        mma(BFloat{}, d, high_second, b[m].z, b[m].w);
#pragma unroll
        for (int r = 0; r < 4; ++r) dot[t][m][r] += d[r];
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < kHalves; ++i) {
      const float norm = sum_of_quad(square[t][i]);
      const int q = t * 16 + i * 8 + lane / 4;
      if (q >= Q) continue;
      float* mine = sums + (turn * Q + q) * kSums;
#pragma unroll
      for (int m = 0; m < kEights; ++m) {
        const int direction = (part * kEights + m) * 8 + lane % 4 * 2;
        mine[direction] = dot[t][m][i * 2];
        mine[direction + 1] = dot[t][m][i * 2 + 1];
      }
      if (part == 0 && lane % 4 == 0) mine[kDirections] = norm;
    }
  }
}

__device__ __forceinline__ float sum_over_warp(float v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  return v;
}

// One warp's lane: coordinates `lane` and `lane + 32` of a query, and |y|^2, all as computed.
struct Projected {
  float a, b, square;
};

// Of query q, from the sums of all warps.
template <int Q>
__device__ __forceinline__ Projected projected(const float* sums, int q) {
  using Shape = Projection<Q>;
  const int lane = lane_id();
  Projected all = {0, 0, 0};
#pragma unroll
  for (int turn = 0; turn < Shape::kTurns; ++turn) {
    const float* part = sums + (turn * Q + q) * Shape::kSums;
    all.a += part[lane];
    all.b += part[lane + 32];
    all.square += part[kDirections];
  }
  return all;
}

// One warp: the sketch of a query. False: it cannot be told.
__device__ __forceinline__ bool measure(const SketchView& sketch, const Projected& projected,
                                        Sketched& out) {
  const int lane = lane_id();
  const auto [a, b, square] = projected;
  const float coordinates_square = sum_over_warp(fmaf(a, a, b * b));
  const float norm = fmaf(__fsqrt_rn(square), sketch.margin.norm, 0x1p-56f);
  const float error = fmaf(norm, sketch.margin.coordinates, 0x1p-60f);
  const float residual_square = square - coordinates_square;
  const float square_error = fmaf(norm, fmaf(norm, sketch.margin.square, 2.2f * error), 0x1p-118f);
  const float low = __fsqrt_rn(fmaxf(residual_square - square_error, 0)) * (1 - 0x1p-20f);
  const float high = __fsqrt_rn(fmaxf(residual_square, 0) + square_error) * (1 + 0x1p-20f);
  const float middle = sketch.scales[kMiddle];
  out.coordinates[lane] = a;
  out.coordinates[lane + 32] = b;
  if (lane == 0) {
    // Of all roundings, 2^-22 of what is rounded.
    out.residual_low = low - middle - (low + fabsf(middle)) * 0x1p-22f;
    out.residual_high = high - middle + (high + fabsf(middle)) * 0x1p-22f;
    out.error = error;
  }
  return error < infinity() && square_error < infinity() && fabsf(coordinates_square) < infinity();
}

// The squared gap between phi(x) and what is stored, so far: Lemma 16 of docs/error-bounds.md.
__device__ __forceinline__ float gap_of_residual(const Sketched& query, float stored) {
  const float gap = fmaxf(fmaxf(query.residual_low - stored, stored - query.residual_high), 0);
  return gap * gap;
}
__device__ __forceinline__ float gap_of_one(float coordinate, float stored, float so_far) {
  const float gap = coordinate - stored;
  return fmaf(gap, gap, so_far);
}

// A reach as it is compared with gaps: for the roundings of the canonical distance, the error of
// the query's sketch and the roundings of these numbers (Lemma 16).
__device__ __forceinline__ float widened(float reach, float query_error) {
  return fmaf(reach, 1 + 0x1p-21f, 0x1p-73f) + query_error;
}

// Whether a key with this error cannot be within the reach that was `wide`ned (Lemma 16). False for
// a NaN.
__device__ __forceinline__ bool out_of_reach(float gap, float wide, float key_error) {
  const float t = wide + key_error;
  return gap > fmaf(t * t, 1 + 0x1p-16f, 0x1p-120f);
}

// The error of a key.
__device__ __forceinline__ float error_of(float code, float scale) {
  return code == kUnknown ? infinity() : code * scale;
}

}  // namespace grace::cuda
