// The kernels there are, their shapes, and which one answers.
#pragma once

#include <algorithm>
#include <cstdint>

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
          &tensor_margin};
}

// Which kernel answers. Counted instructions, nothing measured yet: on CUDA cores 16 bytes of keys
// per lane cost 60 instructions with one query and 22 more with each further one, on tensor cores
// 50 with 16 queries and 90 with 64. But 8 KB ahead per warp on CUDA cores are whole rows where a
// tensor scan of few keys has 64 bytes per row and stage, and waits longer. Four times 16 queries
// need 160 KB of shared memory, which not every device has. Only CUDA cores take unaligned rows.
constexpr int64_t kFewBytes = 64 << 10;  // of keys per multiprocessor

template <class T>
Kernel choose(int64_t batch, bool aligned, int64_t bytes_each, int shared_limit) {
  if (batch == 1) return direct<T, 1, 2>();
  if constexpr (sizeof(T) == 2) {
    const Kernel wide = tensor<T, 4, 8, 1, 16>();
    if (aligned && batch > 16 && wide.shared_bytes <= shared_limit) return wide;
    if (aligned && (batch > 8 || bytes_each > kFewBytes)) return tensor<T, 1, 5, 2, 8>();
  }
  return batch <= 4 ? direct<T, 4, 2>() : direct<T, 8, 2>();
}

// The same shape, with a sketch of the keys.
inline Kernel with_sketch(Kernel kernel) {
  kernel.function = kernel.pruned;
  kernel.least_slots = std::max(kernel.least_slots, kBlockSlots);
  return kernel;
}

}  // namespace grace::cuda
