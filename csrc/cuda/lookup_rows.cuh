// Where rows are, 16 bytes of them, and the canonical distance: what both scans and the answer
// share.
//
// The including file provides intrinsics.cuh (or a stand-in for a CPU) first.
#pragma once

#include "lookup_problem.h"

namespace grace::cuda {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;

template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));  // elements of a 16-byte load

__device__ __forceinline__ int lane_id() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / 32; }
__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }
__device__ __forceinline__ bool is_nan(float v) { return v != v; }

// The slots that a block scans. A place in a slice is counted from its beginning.
struct Slice {
  int64_t begin, end;
};

__device__ __forceinline__ int64_t slots_in_use(const Problem& p) {
  if (p.count == nullptr) return p.capacity;
  const int64_t n = *p.count;
  return n < 0 ? 0 : n > p.capacity ? p.capacity : n;
}

// The slice of block `block` of the grid; all begin at multiples of `step` slots.
__device__ __forceinline__ Slice slice_of(const Problem& p, int block, int step) {
  const int64_t n = slots_in_use(p);
  const int64_t per = ((n + gridDim.x - 1) / gridDim.x + step - 1) / step * step;
  const int64_t begin = block * per;
  return {begin < n ? begin : n, begin + per < n ? begin + per : n};
}

__device__ __forceinline__ float radius_of(const Problem& p, int64_t slot) {
  return p.radii[slot * p.radius_stride];
}

// The query of batch item b, or null if it does not ask.
template <class T>
__device__ __forceinline__ const T* query_of(const Problem& p, int64_t b) {
  if (b >= p.batch) return nullptr;
  int64_t row = b;
  if (p.query_row != nullptr) {
    row = p.query_row[b * p.query_row_stride];
    if (row < 0 || row >= p.source_rows) return nullptr;
  }
  return static_cast<const T*>(p.source) + row * p.source_stride;
}

template <class T>
__device__ __forceinline__ const T* key_of(const Problem& p, int64_t slot) {
  return static_cast<const T*>(p.keys) + slot * p.key_stride;
}

// 16 bytes of a row of which `left` bytes are left, zeros past its end. `aligned` rows start at a
// multiple of 16 bytes and are as long as one.
template <class T>
__device__ __forceinline__ uint4 load_vector(const void* from, int left, bool aligned) {
  if (aligned) return left > 0 ? load16(from) : uint4{0, 0, 0, 0};
  uint32_t words[4] = {0, 0, 0, 0};
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (4 * i < left) words[i] = static_cast<const uint32_t*>(from)[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (2 * i >= left) continue;
      words[i / 2] |= static_cast<uint32_t>(static_cast<const uint16_t*>(from)[i]) << (i % 2 * 16);
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

// The same for a place in shared memory, as a copy that may still be on its way; left > 0.
template <class T>
__device__ __forceinline__ void copy_vector(char* shared, const void* from, int left,
                                            bool aligned) {
  if (aligned) {
    copy16(shared, from);
  } else {
    *reinterpret_cast<uint4*>(shared) = load_vector<T>(from, left, false);
  }
}

__device__ __forceinline__ void copy_zeros(char* shared) {
  *reinterpret_cast<uint4*>(shared) = uint4{0, 0, 0, 0};
}

__device__ __forceinline__ void widen_vector(const uint4& v, float (&out)[4], float) {
  out[0] = __uint_as_float(v.x), out[1] = __uint_as_float(v.y);
  out[2] = __uint_as_float(v.z), out[3] = __uint_as_float(v.w);
}

template <class T>
__device__ __forceinline__ void widen_vector(const uint4& v, float (&out)[8], T) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = widen(T{static_cast<uint16_t>(words[i] & 0xffffu)});
    out[2 * i + 1] = widen(T{static_cast<uint16_t>(words[i] >> 16)});
  }
}

// The eight elements of a row from `at` on, which one lane of the canonical sum takes in turn.
template <class T>
__device__ __forceinline__ void load_run(const T* row, int at, int dim, bool aligned,
                                         float (&out)[8]) {
  const int left = (dim - at) * static_cast<int>(sizeof(T));
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float part[4];
      widen_vector(load_vector<T>(row + at + 4 * half, left - 16 * half, aligned), part, T{});
#pragma unroll
      for (int i = 0; i < 4; ++i) out[4 * half + i] = part[i];
    }
  } else {
    widen_vector(load_vector<T>(row + at, left, aligned), out, T{});
  }
}

// The canonical squared distances of K pairs of rows, by one warp, known to all its lanes: element
// i belongs to lane (i / 8) mod 32, a lane adds in ascending i, lanes are folded by halves. fp64,
// never fused. Several pairs at a time hide the latency of one another's loads and additions; only
// the tensor scan has so many queries, and aligned rows.
template <class T, int K>
__device__ __forceinline__ void canonical(const Problem& p, const T* const (&query)[K],
                                          const T* const (&key)[K], float (&s)[K]) {
  const bool keys_aligned = K > 1 || p.keys_aligned, query_aligned = K > 1 || p.source_aligned;
  double sum[K];
#pragma unroll
  for (int j = 0; j < K; ++j) sum[j] = 0;
  const int lane = lane_id();
  for (int base = 0; base < p.dim; base += 256) {
#pragma unroll
    for (int j = 0; j < K; ++j) {
      float x[8], k[8];
      load_run(key[j], base + lane * 8, p.dim, keys_aligned, k);
      load_run(query[j], base + lane * 8, p.dim, query_aligned, x);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const double d = __dsub_rn(static_cast<double>(x[i]), static_cast<double>(k[i]));
        sum[j] = __dadd_rn(sum[j], __dmul_rn(d, d));
      }
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
#pragma unroll
    for (int j = 0; j < K; ++j) {
      const double other = shuffle(sum[j], (lane + step) % 32);
      if (lane < step) sum[j] = __dadd_rn(sum[j], other);
    }
  }
#pragma unroll
  for (int j = 0; j < K; ++j) s[j] = shuffle(__double2float_rn(sum[j]), 0);
}

}  // namespace grace::cuda
