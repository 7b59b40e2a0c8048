// The lookup kernels: nearest, lookup and adapt_ in one launch.
//
//   s(x, k) = round_to_fp32( sum_i (x_i - k_i)^2 ),  i* = argmin_i s(x, k_i),  hit iff d <= radius
//
// Tiling: a grid of slices of the keys times blocks of queries; a block scans its slice in fp32
// (few queries, or fp32: CUDA cores; otherwise tensor cores) for certified intervals lo <= s <= hi,
// turns them into at most one slot per query, and the last block to arrive scores those slots
// canonically, decides, and writes the values of hits. Nothing spins, nothing needs to be reset.
// Blocks of queries: 1, 4 or 8 on CUDA cores, 16 or 64 on tensor cores, see choose() in kernels.h.
// With a sketch of the keys a block first lets that resolve its slice, see lookup_pruned.cuh. Forms
// that are off by default (forms.h) scan exactly or by warpgroups, answer apart or begin sketches
// apart.
// Bytes read: every key once per block of queries, so ceil(B / 8) times for B > 8 fp32 or unaligned
// queries and ceil(B / 64) times for 16-bit ones, though blocks of one slice may meet in L2; 16
// bytes per slice and query. Limit: the bandwidth of the memory for one block of queries on tensor
// cores or a few queries on CUDA cores, instructions beyond. Counted, not measured.
#pragma once

#include "lookup_apart.cuh"
#include "lookup_direct.cuh"
#include "lookup_exact.cuh"
#include "lookup_pruned.cuh"
#include "lookup_tensor.cuh"
#include "lookup_warpgroups.cuh"

namespace grace::cuda {

template <class Shape>
__device__ __forceinline__ Shared<Shape::kQueries>& shared_of() {
  return *reinterpret_cast<Shared<Shape::kQueries>*>(dynamic_shared() + Shape::kScanBytes);
}

template <class T, int Q, int R>
__global__ void __launch_bounds__(kThreads, DirectScan<T, Q, R>::kBlocks)
    direct_kernel(const __grid_constant__ Problem p) {
  const float largest = direct_lookup<T, Q, R>(p, slice_of(p, blockIdx.x, 1));
  conclude<T, Q>(p, largest, -1, dynamic_shared(), shared_of<DirectScan<T, Q, R>>());
}

template <class T, class Shape>
__global__ void __launch_bounds__(kThreads, Shape::kBlocks)
    tensor_kernel(const __grid_constant__ Problem p) {
  const float largest = tensor_lookup<T, Shape>(p, slice_of(p, blockIdx.x, 1));
  conclude<T, Shape::kQueries>(p, largest, -1, dynamic_shared(), shared_of<Shape>());
}

template <class T, int Q, int R>
__global__ void __launch_bounds__(kThreads, DirectScan<T, Q, R>::kBlocks)
    direct_pruned_kernel(const __grid_constant__ Problem p) {
  const Slice slice = slice_of(p, blockIdx.x, kBlockSlots);
  wait_for_sketches(p, slice);
  Resolved resolved = resolve_by_sketch<T, DirectScan<T, Q, R>>(p, slice);
  if (resolved.scored < 0) resolved.largest = direct_lookup<T, Q, R>(p, slice);
  Shared<Q>& shared = shared_of<DirectScan<T, Q, R>>();
  conclude<T, Q>(p, resolved.largest, resolved.scored, dynamic_shared(), shared);
  tally<T, Q>(p, shared);
}

template <class T, class Shape>
__global__ void __launch_bounds__(kThreads, Shape::kBlocks)
    tensor_pruned_kernel(const __grid_constant__ Problem p) {
  const Slice slice = slice_of(p, blockIdx.x, kBlockSlots);
  wait_for_sketches(p, slice);
  Resolved resolved = resolve_by_sketch<T, Shape>(p, slice);
  if (resolved.scored < 0) resolved.largest = tensor_lookup<T, Shape>(p, slice);
  Shared<Shape::kQueries>& shared = shared_of<Shape>();
  conclude<T, Shape::kQueries>(p, resolved.largest, resolved.scored, dynamic_shared(), shared);
  tally<T, Shape::kQueries>(p, shared);
}

template <class T, int Q, int R>
__global__ void __launch_bounds__(kThreads, ExactScan<T, Q, R>::kBlocks)
    exact_kernel(const __grid_constant__ Problem p) {
  exact_lookup<T, Q, R>(p, slice_of(p, blockIdx.x, 1), shared_of<ExactScan<T, Q, R>>());
}

// Registers of a thread that fills and of one that multiplies. All begin with 168, the most for 384
// threads, and there are no others to be had.
constexpr int kFillRegisters = 72, kMultiplyRegisters = 216, kFirstRegisters = 168;
static_assert(kFillRegisters + kFillers * kMultiplyRegisters == 3 * kFirstRegisters);
static_assert(kFirstRegisters == 65536 / kWarpgroupThreads / 8 * 8);

template <class T, class Shape>
__global__ void __launch_bounds__(kWarpgroupThreads, 1)
    warpgroup_kernel(const __grid_constant__ Problem p) {
#ifdef GRACE_HAS_WARPGROUPS
  constexpr int kQueries = Shape::kQueries;
  char* memory = swizzled_shared();
  Shared<kQueries>& shared = *reinterpret_cast<Shared<kQueries>*>(memory + Shape::kScanBytes);
  Ring<Shape>& ring = *reinterpret_cast<Ring<Shape>*>(&shared + 1);
  const Slice slice = slice_of(p, blockIdx.x, 1);
  start_ring<T, Shape>(p, ring);
  if (threadIdx.x >= kThreads) {
    give_registers_up<kFillRegisters>();
    fill_ring<T, Shape>(p, slice, memory, ring, shared.query_norm);
  } else {
    take_registers<kMultiplyRegisters>();
    const float largest = multiply_and_resolve<T, Shape>(p, slice, memory, ring, shared.query_norm);
    if constexpr (kQueries > 64) {
      leave_slice<kQueries>(p, largest, -1, shared);  // always answered apart, see kernels.h
    } else {
      conclude<T, kQueries>(p, largest, -1, memory, shared);
    }
  }
#endif
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) apart_kernel(const __grid_constant__ Problem p) {
  answer_apart<T>(p, *reinterpret_cast<Apart*>(dynamic_shared()));
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    coordinates_kernel(const __grid_constant__ Problem p) {
  begin_sketches<T>(p);
}

}  // namespace grace::cuda
