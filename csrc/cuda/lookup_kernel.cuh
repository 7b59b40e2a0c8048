// The lookup kernels: nearest, lookup and adapt_ in one launch.
//
//   s(x, k) = round_to_fp32( sum_i (x_i - k_i)^2 ),  i* = argmin_i s(x, k_i),  hit iff d <= radius
//
// Tiling: a grid of slices of the keys times blocks of queries; a block scans its slice in fp32
// (few queries, or fp32: CUDA cores; otherwise tensor cores) for certified intervals lo <= s <= hi,
// turns them into at most one row per query, and the last block to arrive scores those rows
// canonically, decides, and writes the values of hits. Nothing spins, nothing needs to be reset.
// Blocks of queries: 1, 4 or 8 on CUDA cores, 16 or 64 on tensor cores, see choose() in lookup.cu.
// Bytes read: every key once per block of queries, so ceil(B / 8) times for B > 8 fp32 or unaligned
// queries and ceil(B / 64) times for 16-bit ones, though blocks of one slice may meet in L2; 16
// bytes per slice and query. Limit: the bandwidth of the memory for one block of queries on tensor
// cores or a few queries on CUDA cores, instructions beyond. Counted, not measured.
#pragma once

#include "lookup_direct.cuh"
#include "lookup_tensor.cuh"

namespace grace::cuda {

template <class T, int Q, int R>
__global__ void __launch_bounds__(kThreads, DirectScan<T, Q, R>::kBlocks)
    direct_kernel(const __grid_constant__ Problem p) {
  direct_lookup<T, Q, R>(p);
}

template <class T, class Shape>
__global__ void __launch_bounds__(kThreads, Shape::kBlocks)
    tensor_kernel(const __grid_constant__ Problem p) {
  tensor_lookup<T, Shape>(p);
}

}  // namespace grace::cuda
