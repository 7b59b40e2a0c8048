// Rows in chunks of 256 elements, copied to shared memory ahead of their use: what the forms have
// in common that compute canonical distances of aligned rows with loads on their way.
//
// A lane of the canonical sum takes eight neighbours of a chunk. For 16-bit elements those are the
// 16 bytes that it copies itself. For fp32 they are 32, which two lanes copy: copies of a warp are
// of neighbours, since half of a 32-byte sector at a time would cost the whole of it twice.
#pragma once

#include "lookup_rows.cuh"

namespace grace::cuda {

template <class T>
struct Chunk {
  static constexpr int kBytes = 256 * static_cast<int>(sizeof(T));
  static constexpr int kPieces = kBytes / 512;  // of 16 bytes that a lane copies
  static constexpr bool kShared = kPieces > 1;  // lanes read what others have copied
};

// Where piece i of an fp32 chunk stands: eight lanes that read every second piece meet all banks.
__device__ __forceinline__ int place_of_piece(int i) { return (i ^ (i >> 3 & 1)) * 16; }

// Chunks of a row.
template <class T>
__device__ __forceinline__ int chunks_of(const Problem& p) {
  const int bytes = p.dim * static_cast<int>(sizeof(T));
  return bytes > Chunk<T>::kBytes ? (bytes + Chunk<T>::kBytes - 1) / Chunk<T>::kBytes : 1;
}

// This lane's share of copying a chunk of an aligned row, of which `left` bytes are left.
template <class T>
__device__ __forceinline__ void copy_chunk(char* chunk, const char* from, int left) {
#pragma unroll
  for (int i = 0; i < Chunk<T>::kPieces; ++i) {
    const int piece = i * 32 + lane_id();
    if (piece * 16 >= left) continue;
    copy16(chunk + (Chunk<T>::kShared ? place_of_piece(piece) : piece * 16), from + piece * 16);
  }
}

// What this lane of the canonical sum takes of a chunk that has arrived; zeros past the row's end.
template <class T>
__device__ __forceinline__ void read_chunk(const char* chunk, int left, double (&out)[8]) {
  float part[kVector<T>];
#pragma unroll
  for (int i = 0; i < Chunk<T>::kPieces; ++i) {
    const int piece = lane_id() * Chunk<T>::kPieces + i;
    uint4 v = {0, 0, 0, 0};
    if (piece * 16 < left) {
      v = *reinterpret_cast<const uint4*>(chunk +
                                          (Chunk<T>::kShared ? place_of_piece(piece) : piece * 16));
    }
    widen_vector(v, part, T{});
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) {
      out[i * kVector<T> + e] = static_cast<double>(part[e]);
    }
  }
}

// The canonical sum of squares goes on by eight elements of this lane. fp64, never fused.
__device__ __forceinline__ double add_squares(double sum, const double (&x)[8],
                                              const double (&k)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const double d = __dsub_rn(x[i], k[i]);
    sum = __dadd_rn(sum, __dmul_rn(d, d));
  }
  return sum;
}

// The lane sums of V pairs -> their canonical sums, lane l gets that of pair l / (32 / V). While
// there are more than one, a step halves those that a lane is responsible for. What is added to
// what is as in the fold of SPEC: lane l < step takes lane l + step. (The other way round, in the
// lanes above, a + b is b + a.) Recursive, so that no value is indexed at run time.
template <int V, int Step>
__device__ __forceinline__ double fold_of_warp(const double (&sum)[V]) {
  if constexpr (V > 1) {
    const bool upper = lane_id() & Step;
    double half[V / 2];
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      const double keep = upper ? sum[i + V / 2] : sum[i], send = upper ? sum[i] : sum[i + V / 2];
      half[i] = __dadd_rn(keep, shuffle_xor(send, Step));
    }
    return fold_of_warp<V / 2, Step / 2>(half);
  } else if constexpr (Step > 0) {
    const double both[1] = {__dadd_rn(sum[0], shuffle_xor(sum[0], Step))};
    return fold_of_warp<1, Step / 2>(both);
  } else {
    return sum[0];
  }
}

}  // namespace grace::cuda
