// What a CUDA lookup kernel is given. Pointers, sizes and strides only; no torch.
#pragma once

#include <cstdint>

#include "../sketch_layout.h"

namespace grace::cuda {

// How far the sketch of a query may mislead, see sketch_margin().
struct SketchMargin {
  float norm, coordinates, square;
};

// The tensors of a grace_kernels.Sketch, which says what they mean.
struct SketchView {
  const float* centre;         // [dim]
  const uint16_t* directions;  // [kDirections, dim] bfloat16
  bool aligned;                // 16-byte loads fit centre and directions
  const float* scales;         // [kScales]
  const int8_t* head;          // [blocks, kHeadNumbers, kBlockSlots]
  const int8_t* tail;          // [blocks, kTailNumbers, kBlockSlots]
  int64_t blocks;
  const int64_t* covered;
  const float* radius_bound;
  const int64_t* outliers;  // [kOutliers]
  int64_t* counters;        // [kCounters]; null: there is no sketch
  SketchMargin margin;
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

  // Where answers are a launch of their own, see lookup_apart.cuh: the slices of the scan and the
  // queries of its blocks. Otherwise 0.
  int apart_slices, apart_queries;

  SketchView sketch;  // for the pruned operators only
  // Where the sketches of queries are begun in a launch of their own, see lookup_coordinates.cuh:
  // kSums numbers per part of the width and query. Otherwise null.
  float* sums;
};

// What one slice of the keys knows of one query: lo <= s <= hi for the s of the nearest of its
// keys, which is `row`. Equal bounds are that s itself. No row: -1 and +inf. The record of the
// slice itself has a bound of its radii twice, and how many pairs its sketch left to be scored; -1
// where its rows were scanned.
struct alignas(16) Partial {
  float lo, hi;
  int64_t row;
};

// How far a scan may mislead, that is, how an interval that holds s is made from what the scan
// computed in fp32. The lemmas named here are in docs/error-bounds.md.
struct Margin {
  float relative, absolute;
};

// For a sum c of squared differences: |c - s| <= relative c + absolute (Lemma 7).
inline Margin direct_margin(int64_t dim) {
  const double m = (static_cast<double>(dim) / 32 + 20) * 0x1p-24;
  const double g = m / (1 - m);
  return {static_cast<float>(1.2 * g + 0x1p-21), static_cast<float>((dim + 32.0) * 0x1p-147)};
}

// What one step of a tensor core is assumed to err by, as a share of the magnitudes that it adds.
constexpr double kTensorError = 0x1.2611186bae672p-19;  // 2^-18.8

// For c = M - 2 x.k by tensor cores, M = |x|^2 + |k|^2: |c - s| <= relative M + absolute (Lemma 8).
// `Chain` elements are added up by tensor cores, 16 at a step.
template <int Chain>
Margin tensor_margin(int64_t dim) {
  const double u = 0x1p-24, d = static_cast<double>(dim);
  const double r = 1.05 * ((Chain / 16 + 0.1) * kTensorError + (2.2 * (d / Chain) + 32) * u);
  return {static_cast<float>(r), static_cast<float>((dim + 32.0) * 0x1p-120)};
}

// For the sketch of a query by tensor cores: of its length, of its coordinates and of the square of
// its residual, see measure() (Lemma 18).
inline SketchMargin sketch_margin(int64_t dim) {
  const double u = 0x1p-24, d = static_cast<double>(dim);
  const double m = (d / 16 + 32) * u, g = m / (1 - m);
  const double chunks = 4.1 * kTensorError + 1.1 * (d / 128 + 12) * u;
  return {static_cast<float>(1 + g + 0x1p-20),
          static_cast<float>(1.05 * (u + 0x1p-16 + 8.2 * chunks)), static_cast<float>(g + 0x1p-18)};
}

constexpr int64_t kMaxDim = int64_t{1} << 24;
constexpr int64_t kMaxSliceSlots = int64_t{1} << 30;  // a place in a slice is an int
constexpr int64_t kMaxSlots = 64 * kMaxSliceSlots;    // every kernel can have 64 slices

}  // namespace grace::cuda
