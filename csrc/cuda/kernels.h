// The kernels there are, their shapes, and which one answers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "forms.h"
#include "lookup_kernel.cuh"

namespace grace::cuda {

// A kernel and its shape, see there.
struct Kernel {
  const void* function;
  const void* pruned;
  int queries;       // per block
  int scan_bytes;    // of shared memory, for the scan and then for the partials
  int shared_bytes;  // with the rest
  int blocks;        // per multiprocessor
  int least_slots;   // of a slice; fewer are not worth a block
  Margin (*margin)(int64_t dim);
  int threads = kThreads;
  bool apart = false;  // leaves its answers to a launch behind it
};

template <class T, int Q, int R>
Kernel direct() {
  using Shape = DirectScan<T, Q, R>;
  return {reinterpret_cast<const void*>(&direct_kernel<T, Q, R>),
          reinterpret_cast<const void*>(&direct_pruned_kernel<T, Q, R>),
          Q,
          Shape::kScanBytes,
          Shape::kScanBytes + static_cast<int>(sizeof(Shared<Q>)),
          Shape::kBlocks,
          kWarps,
          &direct_margin};
}

template <class T, int MT, int Stages, int Blocks, int LeastSlots>
Kernel tensor() {
  using Shape = TensorScan<T, MT, Stages, Blocks>;
  constexpr int kQueries = Shape::kQueries;
  return {reinterpret_cast<const void*>(&tensor_kernel<T, Shape>),
          reinterpret_cast<const void*>(&tensor_pruned_kernel<T, Shape>),
          kQueries,
          Shape::kScanBytes,
          Shape::kScanBytes + static_cast<int>(sizeof(Shared<kQueries>)),
          Shape::kBlocks,
          LeastSlots,
          &tensor_margin<Shape::kElements>};
}

template <class T, int QT, int Columns, int Stages>
Kernel warpgroup() {
  using Shape = WarpgroupScan<T, QT, Columns, Stages>;
  constexpr int kQueries = Shape::kQueries;
  return {reinterpret_cast<const void*>(&warpgroup_kernel<T, Shape>),
          nullptr,
          kQueries,
          Shape::kScanBytes,
          Shape::kScanBytes + static_cast<int>(sizeof(Shared<kQueries>) + sizeof(Ring<Shape>)),
          Shape::kBlocks,
          16,
          &tensor_margin<Shape::kElements>,
          kWarpgroupThreads,
          kQueries > 64};
}

inline Margin no_margin(int64_t) { return {0, 0}; }

template <class T, int Q, int R>
Kernel exact() {
  using Shape = ExactScan<T, Q, R>;
  return {reinterpret_cast<const void*>(&exact_kernel<T, Q, R>),
          nullptr,
          Q,
          Shape::kScanBytes,
          Shape::kScanBytes + static_cast<int>(sizeof(Shared<Q>)),
          Shape::kBlocks,
          kWarps,
          &no_margin};
}

// A kernel of a launch before or behind: a function and its shared memory are all that matters.
inline Kernel beside(const void* function, int shared_bytes) {
  return {function, nullptr, 1, 0, shared_bytes, 2, 1, &no_margin};
}
template <class T>
Kernel apart() {
  return beside(reinterpret_cast<const void*>(&apart_kernel<T>), static_cast<int>(sizeof(Apart)));
}
template <class T>
Kernel coordinates() {
  return beside(reinterpret_cast<const void*>(&coordinates_kernel<T>), kCoordinateBytes);
}

// What a call is about, as far as a choice depends on it: shapes, never count.
struct Asked {
  int64_t batch, capacity, dim;
  bool aligned, pruned;
  int processors, shared_limit, capability;  // 90 for 9.0
};

// Chips that issue half as many fp64 instructions as fp32 ones, or near it. Of others, 10.3 and
// what is sold to consumers issue 1 for 64.
constexpr int kCheapDoubles[] = {80, 90, 100};

// Predicted, not measured: the scan for few queries is bound by the memory all the same, and for
// small problems by latency, of which exact distances have one round trip less.
constexpr double kFewSquares = 5e7;  // queries times slots times width

template <class T>
bool exact_pays(const Asked& asked) {
  const bool cheap = std::find(std::begin(kCheapDoubles), std::end(kCheapDoubles),
                               asked.capability) != std::end(kCheapDoubles);
  const double squares = static_cast<double>(asked.batch) * asked.capacity * asked.dim;
  return cheap && (asked.batch <= (sizeof(T) == 2 ? 2 : 4) || squares <= kFewSquares);
}

// Which kernel answers; times are of benchmarks/results/nvidia-h100-4727689.csv. On CUDA cores 16
// bytes of keys per lane cost 60 instructions with one query and 22 more with each further one, on
// tensor cores 50 with 16 queries and 90 with 64. But 8 KB ahead per warp on CUDA cores are whole
// rows where a tensor scan of few keys has 64 bytes per row and stage, and waits longer: 8 queries
// of 1,000 x 4096 take 31 us on CUDA cores, of 1,000 x 11008 194 on tensor cores. Four times 16
// queries need 160 KB of shared memory, which not every device has. Only CUDA cores take unaligned
// rows. The limits below are estimates; that of rows has an effect in a form of its own alone.
constexpr int64_t kFewBytes = 64 << 10;  // of keys per multiprocessor
constexpr int64_t kFewRows = 128;        // to a block; fewer are half a tile of a tensor scan

// Of the kernels for warpgroups, compiled in kernels_warpgroups_*.cu. Slices of few keys take small
// tiles, of which many stages are on their way.
template <class T>
Kernel warpgroups(const Asked& asked) {
  if (asked.batch > 64) return warpgroup<T, 2, 128, 4>();
  return asked.capacity <= 64 * asked.processors ? warpgroup<T, 1, 32, 12>()
                                                 : warpgroup<T, 1, 128, 5>();
}
extern template Kernel warpgroups<Half>(const Asked&);
extern template Kernel warpgroups<BFloat>(const Asked&);

// Whether they were compiled for this chip, which setup.py sees to.
inline bool has_warpgroups(const Asked& asked) {
#ifdef GRACE_WARPGROUPS
  return asked.capability == 90;
#else
  return false;
#endif
}

template <class T>
Kernel choose(const Asked& asked, unsigned forms) {
  const int64_t batch = asked.batch;
  if (asked.aligned && !asked.pruned &&
      (forms & kFormExactAlways || (forms & kFormExact && exact_pays<T>(asked)))) {
    if (batch == 1) return exact<T, 1, 2>();
    if (batch == 2) return exact<T, 2, 2>();
    return batch <= 4 ? exact<T, 4, 2>() : exact<T, 8, 2>();
  }
  if (batch == 1) return direct<T, 1, 2>();
  const int64_t bytes_each =
      asked.capacity * asked.dim * static_cast<int64_t>(sizeof(T)) / asked.processors;
  if constexpr (sizeof(T) == 2) {
    if (forms & kFormWarpgroups && has_warpgroups(asked) && asked.aligned && !asked.pruned &&
        batch > 16) {
      const Kernel kernel = warpgroups<T>(asked);
      if (kernel.shared_bytes <= asked.shared_limit) return kernel;
    }
    const Kernel wide = tensor<T, 4, 8, 1, 16>();
    if (asked.aligned && batch > 16 && wide.shared_bytes <= asked.shared_limit) return wide;
    const bool rows =
        forms & kFormRows && batch <= 16 && asked.capacity < kFewRows * 2 * asked.processors;
    if (asked.aligned && !rows && (batch > 8 || bytes_each > kFewBytes)) {
      return tensor<T, 1, 5, 2, 8>();
    }
  }
  return batch <= 4 ? direct<T, 4, 2>() : direct<T, 8, 2>();
}

// Compiled in kernels_*.cu.
extern template Kernel choose<float>(const Asked&, unsigned);
extern template Kernel choose<Half>(const Asked&, unsigned);
extern template Kernel choose<BFloat>(const Asked&, unsigned);
extern template Kernel apart<float>();
extern template Kernel apart<Half>();
extern template Kernel apart<BFloat>();
extern template Kernel coordinates<float>();
extern template Kernel coordinates<Half>();
extern template Kernel coordinates<BFloat>();

// The same shape, with a sketch of the keys.
inline Kernel with_sketch(Kernel kernel) {
  kernel.function = kernel.pruned;
  kernel.least_slots = std::max(kernel.least_slots, kBlockSlots);
  return kernel;
}

}  // namespace grace::cuda
