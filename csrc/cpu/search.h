// From pointers to answers: threads, bounds, and who answers. No tensors.
#pragma once

#include <cstdint>

#include "lookup_kernel.h"

namespace grace::cpu {

// Slots 0..count-1 of a codebook.
struct Codebook {
  const void* keys;
  int64_t key_stride;  // elements between slots; the elements of a key are neighbours
  Dtype dtype;
  int64_t dim;
  const float* radii;
  int64_t count;
};

// A sketch of slots 0..covered-1 of it.
struct Sketch {
  Codes codes;
  int64_t covered;
  int64_t* counters;  // [kCounters]
};

// The rows of `source` that ask: all, or row[b] where that is not negative.
struct Asking {
  const char* source;
  int64_t stride_bytes;
  int64_t batch;
  const int64_t* row;
};

// Answer every batch item. `bounded`: the radius of the nearest slot decides over a hit (lookup).
void find_nearest(const Codebook& codebook, const Asking& asking, bool bounded, int64_t* index,
                  float* distance);

// The same, bounded, and through a sketch as far as it covers the slots.
void find_pruned(const Codebook& codebook, const Sketch& sketch, const Asking& asking,
                 int64_t* index, float* distance);

}  // namespace grace::cpu
