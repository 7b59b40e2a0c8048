// What a CPU lookup kernel is given and must do. Pointers and sizes only; no torch.
#pragma once

#include <cstdint>

#include "../sketch_layout.h"

namespace grace::cpu {

enum class Dtype { kFloat32, kFloat16, kBFloat16 };

// Queries are widened to fp32 (exactly) and padded with zeros to a multiple of this, which is one
// of every instruction set's vector.
constexpr int64_t kPadding = 32;
constexpr int64_t padded(int64_t dim) { return (dim + kPadding - 1) / kPadding * kPadding; }

// More queries take several passes over the keys.
constexpr int64_t kMostQueries = 128;

// What product_kernel_body.h takes at a time.
constexpr int64_t kPanel = 8;  // queries
constexpr int64_t panel_rows(int64_t batch) { return (batch + kPanel - 1) / kPanel * kPanel; }
constexpr int64_t kProductKeys = 128;  // at least; fewer are not worth arranging the queries

constexpr int kCandidates = 24;

// What the kernels of every instruction set were tuned to, see lookup_kernel_body.h.
constexpr int64_t kTileBytes = 128 << 10;  // of keys, met by all queries before the next ones
constexpr int64_t kPage = 4096;
constexpr int64_t kLineBytes = 64;
constexpr int64_t kAhead = 4096;     // bytes between a load and its prefetch
constexpr int64_t kRowsAhead = 8;    // slots between a load and the prefetch of a key's start
constexpr int64_t kFirstCheck = 64;  // elements; far keys are given up there, or at 2, 4, .. times
constexpr int64_t kProductRows = 12;
constexpr int64_t kProductPiece = 256;  // elements of a row

// The state of one query in one thread: slots that may still be the nearest, found by the coarse
// pass, and the best of those that were re-scored canonically.
struct Best {
  float threshold;  // a coarse result above this cannot be the nearest
  float s;          // canonical squared distance of `index`; +inf while there is none
  int64_t index;    // -1: none yet
  int candidates;
  int64_t slot[kCandidates];  // ascending, not yet re-scored
  float coarse[kCandidates];
};

struct Scan {
  const void* keys;
  int64_t key_stride;  // elements between slots
  Dtype dtype;
  int64_t dim;
  const float* radii;    // -inf marks a dead slot
  const float* queries;  // widened and padded, each followed by the sum of its squares
  int64_t query_stride;
  const float* panels;  // the same, see arrange(); or none
  int64_t batch;
  float relative, absolute;  // the margin of the coarse pass, see set_coarse_margin()
};

// A sketch of the keys, see sketch_layout.h.
struct Codes {
  const float* centre;
  const uint16_t* directions;  // bfloat16
  int64_t dim;
  const float* scales;
  const int8_t* head;
  const int8_t* tail;
};

// A query as the sketch sees it: its coordinates, and between which bounds its residual lies, less
// scales[kMiddle].
struct Sketched {
  float coordinates[kDirections];
  float residual_low, residual_high;
  float error;  // of the coordinates, all together
};

struct Pair {
  int64_t slot;
  int64_t query;
};

// One instruction set's implementation. Every one gives the same answers to the bit.
struct Kernels {
  const char* name;
  // Widen one row of `dim` elements, pad it and add the sum of its squares; false if it holds a
  // NaN.
  bool (*prepare)(const void* row, Dtype dtype, int64_t dim, float* out);
  // Fill the panels: panel_rows(batch) * padded(dim) numbers.
  void (*arrange)(const Scan& problem, float* panels);
  int64_t product_batch;  // the queries from which panels are wanted
  // Take keys begin..end-1 into account; calls with the same `best` come in ascending order.
  void (*scan)(const Scan& problem, int64_t begin, int64_t end, Best* best);
  // Re-score what is left, after which `s` and `index` are final.
  void (*finish)(const Scan& problem, Best* best);

  // Sketch a widened query; false if that is not possible.
  bool (*sketch)(const Codes& codes, const float* query, Sketched* out);
  // List the survivors among the pairs of slots begin..end-1 (begin is a multiple of kBlockSlots)
  // and queries: those that the sketch leaves within reach, by ascending slot for every query. The
  // reach of query q is min(reach[q], the slot's own radius) where `own`, otherwise reach[q] for
  // every live slot; a negative reach[q] leaves the query out. Returns how many, or -1 where `room`
  // does not hold them.
  int64_t (*filter)(const Codes& codes, const Scan& problem, int64_t begin, int64_t end,
                    const Sketched* queries, const float* reach, bool own, Pair* survivors,
                    int64_t room);
  // The canonical squared distance of a pair, or +inf if it is NaN or certainly above `most`.
  float (*score)(const Scan& problem, const Pair& pair, float most);
  // Take one key into account, as `scan` does.
  void (*consider)(const Scan& problem, const Pair& pair, Best* best);
};

extern const Kernels kBaseline;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

}  // namespace grace::cpu
