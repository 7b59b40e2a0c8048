// What a CUDA lookup kernel is given. Pointers, sizes and strides only; no torch.
#pragma once

#include <cstdint>

namespace grace::cuda {

// The tensors of a grace_kernels.Sketch, which says what they mean.
struct SketchView {
  const float* centre;         // [dim]
  const uint16_t* directions;  // [64, dim] bfloat16
  bool aligned;                // 16-byte loads fit centre and directions
  const float* scales;         // [67]
  const int8_t* head;          // [blocks, 10, 32]
  const int8_t* tail;          // [blocks, 56, 32]
  int64_t blocks;
  const int64_t* covered;
  const float* radius_bound;
  const int64_t* outliers;  // [32]
  int64_t* counters;        // [4]; null: there is no sketch
  // How far the sketch of a query may mislead, see sketch_margin().
  float norm, along, square;
};

struct Problem {
  // The codebook: rows 0..n-1, n = *count clamped to [0, capacity], or capacity.
  const void* keys;
  int64_t key_stride;  // elements between rows; the elements of a row are neighbours
  const float* radii;  // -inf marks a dead slot
  int64_t radius_stride;
  const int64_t* count;  // null: capacity
  int64_t capacity;
  int dim;
  bool keys_aligned;  // 16-byte loads fit every row

  // The queries: row b of source, or row query_row[b] where that lies in [0, source_rows).
  const void* source;
  int64_t source_stride;
  int64_t source_rows;
  const int64_t* query_row;  // null: row b
  int64_t query_row_stride;
  int64_t batch;
  bool source_aligned;

  // Whether the radius of the nearest entry decides over a hit (lookup) or not (nearest).
  bool bounded;
  // The margin of the scan, see direct_margin() and tensor_margin().
  float relative, absolute;

  int64_t* index;
  float* distance;

  // adapt_: the value of a hit is written to rows first_row[b]..last_row[b]-1 of hidden, in units
  // of `unit` bytes. Strides in bytes. hidden is null for the other operators.
  char* hidden;
  int64_t hidden_rows, hidden_stride, hidden_step;
  const char* values;
  int64_t value_stride, value_step;
  int64_t units;  // per row
  int unit;       // 2, 4, 8 or 16
  const int64_t* first_row;
  int64_t first_row_stride;
  const int64_t* last_row;
  int64_t last_row_stride;

  // One record per slice of the keys, query block and query (and one more for the slice's largest
  // radius), written before the block's ticket is taken. The ticket is 0 before and after a launch.
  void* partials;
  unsigned* tickets;

  SketchView sketch;  // for the pruned operators only
};

// What one slice of the keys knows of one query: lo <= s <= hi for the s of the nearest of its
// keys, which is `row`. Equal bounds are that s itself. No row: -1 and +inf. The record of the
// slice itself has a bound of its radii twice, and how many pairs its sketch left to be scored; -1
// where its rows were scanned.
struct alignas(16) Partial {
  float lo, hi;
  int64_t row;
};

// How far a scan may mislead. Let S be the exact sum of squares of a pair, s the canonical fp32
// value, c what the scan computed in fp32, u = 2^-24. s is S within a factor 1 +- (u + 2^-34) and
// 2^-150 (its fp64 sum has at most 2^19 + 5 additions, one rounding to fp32 follows), so an
// interval round c that holds S holds s once it is widened by 2^-22 of itself and 2^-149.

struct Margin {
  float relative, absolute;
};

// Direct form, |c - S| <= g S + e: the difference carries one rounding (twice, being squared), the
// square one, at most D/32 + 8 additions in a lane and 5 across lanes follow; four to spare:
//     g = m u / (1 - m u), m = D/32 + 20, e = (2 D + 64) 2^-150 for what underflows.
//     c (1 - r) - a <= s <= c (1 + r) + a,  r = 1.2 g + 2^-21,  a = (D + 32) 2^-147
// since g <= 0.1 for D <= kMaxDim; 2^-21 covers s and the roundings of the bounds themselves.
inline Margin direct_margin(int64_t dim) {
  const double m = (static_cast<double>(dim) / 32 + 20) * 0x1p-24;
  const double g = m / (1 - m);
  return {static_cast<float>(1.2 * g + 0x1p-21), static_cast<float>((dim + 32.0) * 0x1p-147)};
}

// Tensor cores, c = (|x|^2 + |k|^2) - 2 x.k, M = |x|^2 + |k|^2, sum |x_i k_i| <= M / 2.
// * Products are exact. One step of mma over 16 elements is assumed to err by at most t = 2^-18.8
//   times the sum of its |products| and |accumulator|: 17 addends, each cut off at the 24th bit of
//   the largest, 34 u, and two roundings. (Fasi et al. 2021 measured cuts there or lower.) An
//   accumulator takes two steps, starting at zero: 2.1 t per chunk of 32; the chunks are added in
//   fp32, D/32 + 1 roundings: x.k errs by (2.1 t + 1.1 (D/32 + 1) u) M / 2, and c by twice that.
// * A norm: 8 squares are added, those sums over the chunks, then four lanes: D/32 + 12 roundings.
// * The last additions: 4 u M, s itself: |s - S| <= 2^-23 S, S <= 2 M, and four to spare.
//     |c - s| <= r M + a,  r = 1.05 (2.1 t + (2.2 (D/32) + 32) u),  a = (D + 32) 2^-120
// where r M may be computed from the rounded M, and `a` covers whatever is flushed on the way.
constexpr double kTensorError = 0x1.2611186bae672p-19;  // t = 2^-18.8

inline Margin tensor_margin(int64_t dim) {
  const double u = 0x1p-24;
  const double r = 1.05 * (2.1 * kTensorError + (2.2 * (static_cast<double>(dim) / 32) + 32) * u);
  return {static_cast<float>(r), static_cast<float>((dim + 32.0) * 0x1p-120)};
}

// The sketch of a query: y = fl(x - c), a = fl(P y) by tensor cores, A = fl(|y|^2). Let z = x - c
// and t as above.
// * |y - z| <= u |z|, and A has at most D/16 + 32 roundings in a row, one of them per product, so
//   |z|, |y| <= norm sqrt(A) + 2^-56 =: N, norm = 1 + g + 2^-20, g = m u / (1 - m u), m = D/16 +
//   32; squares that underflow, at most 2^24 of them, are in the 2^-56.
// * y is cut into two bfloat16, rounded to nearest: what is lost is at most 2^-16 |y|, and |P|
// <= 1.
// * A coordinate: sum |P_i| (|y1_i| + |y2_i|) <= 1.02 |y| by Cauchy and Schwarz. A chunk of 32
//   elements takes four steps of mma from zero, 4.1 t of that sum; the chunks are added in fp32,
//   D/128 + 12 roundings in a row. The 64 errors together are at most 8 times as long.
//     |a - P z| <= along N + 2^-60 =: E,  along = 1.05 (u + 2^-16 + 8.2 (4.1 t + 1.1 (D/128 + 12)
//     u))
//   where 2^-60 is for all that is flushed or underflows: 64 D numbers below 2^-125.
// * rho^2 = |z|^2 - |P z|^2 against v = A - |a|^2, which takes 9 roundings more: |z|^2 is A within
//   (g + 3 u) N^2, |P z|^2 is |a|^2 within (2 N + E) E <= 2.2 N E, as E <= 0.2 N.
//     |rho^2 - v| <= square N^2 + 2.2 N E + 2^-118,  square = g + 2^-18
struct SketchMargin {
  float norm, along, square;
};

inline SketchMargin sketch_margin(int64_t dim) {
  const double u = 0x1p-24, d = static_cast<double>(dim);
  const double m = (d / 16 + 32) * u, g = m / (1 - m);
  const double chunks = 4.1 * kTensorError + 1.1 * (d / 128 + 12) * u;
  return {static_cast<float>(1 + g + 0x1p-20),
          static_cast<float>(1.05 * (u + 0x1p-16 + 8.2 * chunks)), static_cast<float>(g + 0x1p-18)};
}

constexpr int64_t kMaxDim = int64_t{1} << 24;
constexpr int64_t kMaxSliceRows = int64_t{1} << 30;  // a row of a slice is an int
constexpr int64_t kMaxRows = 64 * kMaxSliceRows;     // every kernel can have 64 slices

}  // namespace grace::cuda
