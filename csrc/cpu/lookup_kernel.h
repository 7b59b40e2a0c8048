// What a CPU lookup kernel is given and must do. Pointers and sizes only; no torch.
#pragma once

#include <cstdint>

namespace grace::cpu {

enum class Dtype { kFloat32, kFloat16, kBFloat16 };

// Queries are widened to fp32 (exactly) and padded with zeros to a multiple of this.
constexpr int64_t kVector = 8;

constexpr int kCandidates = 24;

// What the kernels of every instruction set were tuned to, see lookup_kernel_body.h.
constexpr int64_t kTileBytes = 128 << 10;  // of keys, met by all queries before the next ones
constexpr int64_t kPage = 4096;
constexpr int64_t kAhead = 4096;     // bytes between a load and its prefetch
constexpr int64_t kRowsAhead = 8;    // rows between a load and the prefetch of a row's start
constexpr int64_t kFirstCheck = 64;  // elements; far keys are given up there, or at 2, 4, .. times

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
  int64_t key_stride;  // elements between rows
  Dtype dtype;
  int64_t dim;
  const float* radii;  // -inf marks a dead slot
  const float* queries;
  int64_t query_stride;
  int64_t batch;
  float relative, absolute;  // the margin of the coarse pass, see set_coarse_margin() in lookup.cpp
};

// One instruction set's implementation. Every one gives the same answers to the bit.
struct Kernels {
  const char* name;
  // Widen one row of `dim` elements and pad it; false if it holds a NaN.
  bool (*prepare)(const void* row, Dtype dtype, int64_t dim, float* out);
  // Take keys begin..end-1 into account; calls with the same `best` come in ascending order.
  void (*scan)(const Scan& problem, int64_t begin, int64_t end, Best* best);
  // Re-score what is left, after which `s` and `index` are final.
  void (*finish)(const Scan& problem, Best* best);
};

extern const Kernels kBaseline;
#if defined(__x86_64__)
extern const Kernels kAvx2;
#endif

}  // namespace grace::cpu
