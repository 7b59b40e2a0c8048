// The scan for many queries where a warpgroup multiplies matrices in shared memory (sm_90a), fp16
// and bf16: |x|^2 + |k|^2 - 2 x.k as in lookup_tensor.cuh.
//
// Of three warpgroups the last one fills a ring of stages, 64 elements of all queries of the block
// and of a tile of keys each, and forms their squared lengths, which it has time for; then it ends.
// The other two multiply: queries are the rows of a product, keys its columns, so that a thread
// has all its keys for two queries and keeps what it found of them in registers. A stage is a chain
// of four products from zero, and fp32 additions of its 64 elements follow, while the products of
// the other warpgroup go on. Bytes read: those of lookup_tensor.cuh, but blocks of 128 queries.
// In flight: the stages but one, 120 KB and more. Counted, not measured.
//
// Copies are cp.async and not the bulk copies of TMA: query_row names rows one by one, which a
// tensor map cannot, any stride of 16 bytes fits, nothing is made on the host, and the thread that
// has copied 16 bytes can square them. Both write a stage to shared memory once. TMA would save the
// filling warpgroup some 100 instructions a stage and allow several blocks to share what they read.
#pragma once

#include <warpgroup_intrinsics.cuh>

#include "lookup_tensor.cuh"

namespace grace::cuda {

constexpr int kWarpgroup = 128;                           // threads
constexpr int kFillers = 2;                               // the number of the warpgroup that fills
constexpr int kWarpgroupThreads = kThreads + kWarpgroup;  // two that multiply come first
static_assert(kThreads == kFillers * kWarpgroup);

// For 64 or 128 queries (QT = 1, 2) and products of `Columns` keys.
template <class T, int QT, int Columns, int Stages>
struct WarpgroupScan {
  static_assert(sizeof(T) == 2 && Stages >= 3);
  static constexpr int kQueries = QT * 64;
  static constexpr int kColumns = Columns;
  // A tile is two parts, which have eight rows of it in turn: one for each warpgroup, or both for
  // both, which then have 64 queries each.
  static constexpr int kParts = QT;
  static constexpr int kKeys = 2 * Columns;
  static constexpr int kStages = Stages;
  static constexpr int kBlocks = 1;     // per multiprocessor
  static constexpr int kElements = 64;  // per stage, 128 bytes of a row
  static constexpr int kKeyBytes = kKeys * 128;
  static constexpr int kStageBytes = kKeyBytes + kQueries * 128;
  static constexpr int kScanBytes = kStages * kStageBytes;
  static constexpr int kGroups = 8 / QT;  // of slots that are told apart in a slice
  static_assert(kQueries * kGroups * sizeof(Found) <= kScanBytes);
  static_assert(kKeys % 16 == 0 && kStageBytes % 1024 == 0);
};

// What is in shared memory behind the ring and Shared<Q>.
template <class Shape>
struct Ring {
  uint64_t full[Shape::kStages], empty[Shape::kStages];
  uint64_t read[2];                    // the norms of a tile
  float norm[2][Shape::kKeys];         // |k|^2; NaN where the key holds one, or does not count
  float largest[4];                    // radii, of the warps that fill
  const char* query[Shape::kQueries];  // rows, or null
};

// Which stage comes next, and how often all of them have been there before.
template <int Stages>
struct Turn {
  int stage = 0;
  unsigned round = 0;
  __device__ __forceinline__ void next() {
    if (++stage == Stages) stage = 0, ++round;
  }
};

// The sum over the eight lanes that share rows.
__device__ __forceinline__ float sum_of_eight(float v) {
  return sum_of_quad(v + shuffle_xor(v, 4));
}

__device__ __forceinline__ int steps_of(const Problem& p) { return (p.dim + 63) / 64; }

// The warpgroup that fills. A thread copies 16 bytes of every 16th row, all of one part of a stage.
template <class T, class Shape>
__device__ __forceinline__ void fill_ring(const Problem& p, const Slice& slice, char* memory,
                                          Ring<Shape>& ring, float* query_norms) {
  constexpr int kStages = Shape::kStages, kKeys = Shape::kKeys, kRows = kKeys / 16;
  constexpr int kQueryRows = Shape::kQueries / 16, kRadii = (kRows + 7) / 8;
  // A stage is told full when the copies of so many later ones have started, and the one after it
  // may be multiplied while the next one is refilled.
  constexpr int kAhead = kStages - 2;
  const int thread = threadIdx.x - kThreads, part = thread % 8, row = thread / 8;
  const int slots = static_cast<int>(slice.end - slice.begin);
  const int steps = steps_of(p), key_bytes = p.dim * 2;
  const int64_t total = static_cast<int64_t>((slots + kKeys - 1) / kKeys) * steps;
  const int here = row * 128 + (part ^ row % 8) * 16;  // in a stage, and 2048 for the next 16 rows
  const int64_t sixteen_keys = p.key_stride * 32;
  const char* from = static_cast<const char*>(p.keys) + (slice.begin + row) * p.key_stride * 2;
  int place = row, step = 0;  // of what is copied
  Turn<kStages> filling, telling;
  int told_place = row, told_step = 0, tile = 0;
  float key_norm[kRows], query_norm[kQueryRows], radius[kRadii], largest = -infinity();
#pragma unroll
  for (int m = 0; m < kRows; ++m) key_norm[m] = 0;
#pragma unroll
  for (int m = 0; m < kQueryRows; ++m) query_norm[m] = 0;

#pragma unroll 1
  for (int64_t i = 0; i < total + kAhead; ++i) {
    if (i < total) {
      if (filling.round > 0) wait_for(&ring.empty[filling.stage], filling.round - 1);
      char* to = memory + filling.stage * Shape::kStageBytes + here;
      const int at = step * 128 + part * 16;
      const bool within = at < key_bytes;
      // Rows that nobody asks for stay what they are: they meet their own sums alone. But behind
      // the end of a row is 0, or there might be a NaN on the other side.
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        if (place + m * 16 >= slots) continue;
        if (within) {
          copy16(to + m * 2048, from + m * sixteen_keys + at);
        } else {
          copy_zeros(to + m * 2048);
        }
      }
      to += Shape::kKeyBytes;
#pragma unroll
      for (int m = 0; m < kQueryRows; ++m) {
        const char* query = ring.query[row + m * 16];
        if (query == nullptr) continue;
        if (within) {
          copy16(to + m * 2048, query + at);
        } else {
          copy_zeros(to + m * 2048);
        }
      }
      filling.next();
      if (++step == steps) {
        step = 0;
        place += kKeys;
        from += sixteen_keys * kRows;
      }
    }
    commit_copies();
    if (i < kAhead) continue;

    wait_for_copies<kAhead>();
    publish_to_products();
    const bool last = told_step == steps - 1;
    if (!last) {
      converge();
      if (lane_id() == 0) arrive(&ring.full[telling.stage]);
    }
    // Squares of what this thread has copied itself, before it copies something else there.
    const char* copied = memory + telling.stage * Shape::kStageBytes + here;
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      if (told_place + m * 16 >= slots) continue;
      const uint4 v = *reinterpret_cast<const uint4*>(copied + m * 2048);
      key_norm[m] += sum_of_squares<T>(v.x, v.y, v.z, v.w);
    }
    if (tile == 0) {
#pragma unroll
      for (int m = 0; m < kQueryRows; ++m) {
        if (ring.query[row + m * 16] == nullptr) continue;
        const uint4 v = *reinterpret_cast<const uint4*>(copied + Shape::kKeyBytes + m * 2048);
        query_norm[m] += sum_of_squares<T>(v.x, v.y, v.z, v.w);
      }
    }
    // Of the eight threads of a row the one of part m % 8 looks after row m.
    if (told_step == 0) {
#pragma unroll
      for (int n = 0; n < kRadii; ++n) {
        const int of = told_place + (n * 8 + part) * 16;
        const bool one = n * 8 + part < kRows && of < slots;
        radius[n] = one ? radius_of(p, slice.begin + of) : -infinity();
        largest = fmaxf(largest, radius[n]);  // a NaN is no maximum
      }
    }
    if (!last) {
      ++told_step;
      telling.next();
      continue;
    }
    if (tile >= 2) wait_for(&ring.read[tile % 2], tile / 2 - 1);
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      const float norm = sum_of_eight(key_norm[m]);
      key_norm[m] = 0;
      if (part != m % 8) continue;
      const bool live = radius[m / 8] != -infinity();
      ring.norm[tile % 2][row + m * 16] = live ? norm : __uint_as_float(0x7fc00000u);
    }
    if (tile == 0) {
#pragma unroll
      for (int m = 0; m < kQueryRows; ++m) {
        const float norm = sum_of_eight(query_norm[m]);
        if (part == 0) query_norms[row + m * 16] = norm;
      }
    }
    const float largest_here = largest_of_warp(largest);
    converge();
    if (lane_id() == 0) {
      ring.largest[thread / 32] = largest_here;
      arrive(&ring.full[telling.stage]);
    }
    telling.next();
    told_step = 0;
    told_place += kKeys;
    ++tile;
  }
  wait_for_copies<0>();
}

// One of the two warpgroups that multiply; what is found belongs to this lane's two queries.
template <class T, class Shape>
__device__ __forceinline__ void scan_ring(const Problem& p, const Slice& slice, const char* memory,
                                          Ring<Shape>& ring, const float* query_norms,
                                          Found (&found)[2]) {
  constexpr int kParts = Shape::kParts, kSums = Shape::kColumns / 2;
  const int lane = lane_id(), warpgroup = threadIdx.x / kWarpgroup;
  const int slots = static_cast<int>(slice.end - slice.begin), steps = steps_of(p);
  const int first_part = kParts == 1 ? warpgroup : 0;
  const int first_query = (kParts == 1 ? 0 : warpgroup * 64) + warp_id() % 4 * 16 + lane / 4;
  Turn<Shape::kStages> turn;
  float d[kSums], sum[kParts][kSums];
#pragma unroll
  for (int i = 0; i < kSums; ++i) d[i] = 0;

  int tile = 0;
#pragma unroll 1
  for (int base = 0; base < slots; base += Shape::kKeys, ++tile) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sum[part][i] = 0;
    }
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      wait_for(&ring.full[turn.stage], turn.round);
      const char* stage = memory + turn.stage * Shape::kStageBytes;
      const uint64_t a =
          matrix(stage + Shape::kKeyBytes + (kParts == 1 ? 0 : warpgroup * 8192), 1024);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const uint64_t b = matrix(stage + (first_part + part) * 1024, 2048);
        begin_products();
#pragma unroll
        for (int k = 0; k < Shape::kElements / 16; ++k) {
          // From zero: tensor cores add less exactly the more is there already.
          multiply(T{}, d, a + k * kNextProduct, b + k * kNextProduct, k > 0);
        }
        commit_products();
        wait_for_products(d);
#pragma unroll
        for (int i = 0; i < kSums; ++i) sum[part][i] += d[i];
      }
      converge();
      if (lane == 0) arrive(&ring.empty[turn.stage]);
      turn.next();
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int m = 0; m < kSums / 4; ++m) {
        // Of two rows of a, i < 2, and two neighbouring keys, h < 2.
        const int key = m * 16 + (first_part + part) * 8 + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float norm = ring.norm[tile % 2][key + h];
            take_bounds(p, found[i], sum[part][m * 4 + i * 2 + h], query_norms[first_query + i * 8],
                        norm, is_nan(norm), base + key + h);
          }
        }
      }
    }
    converge();
    if (lane == 0) arrive(&ring.read[tile % 2]);
  }
}

// Before the warpgroups go apart.
template <class T, class Shape>
__device__ __forceinline__ void start_ring(const Problem& p, Ring<Shape>& ring) {
  const int64_t first_query = static_cast<int64_t>(blockIdx.y) * Shape::kQueries;
  if (threadIdx.x < Shape::kQueries) {
    ring.query[threadIdx.x] =
        reinterpret_cast<const char*>(query_of<T>(p, first_query + threadIdx.x));
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape::kStages; ++i) {
      start_barrier(&ring.full[i], kWarpgroup / 32);
      start_barrier(&ring.empty[i], kWarps);
    }
    for (int i = 0; i < 2; ++i) start_barrier(&ring.read[i], kWarps);
  }
  __syncthreads();
}

// Scan a slice and resolve its queries, by the two warpgroups that multiply; returns the largest
// radius of the slice. Threads that fill have ended or will: barriers do not wait for them.
template <class T, class Shape>
__device__ __forceinline__ float multiply_and_resolve(const Problem& p, const Slice& slice,
                                                      char* memory, Ring<Shape>& ring,
                                                      const float* query_norms) {
  constexpr int kGroups = Shape::kGroups;
  Found found[2];
  found[0].clear();
  found[1].clear();
  scan_ring<T, Shape>(p, slice, memory, ring, query_norms, found);
  float largest = -infinity();
  if (slice.begin < slice.end) {
    for (int w = 0; w < kWarpgroup / 32; ++w) largest = fmaxf(largest, ring.largest[w]);
  }

  __syncthreads();  // the ring becomes the records of what was found
  const int lane = lane_id(), warpgroup = threadIdx.x / kWarpgroup;
  const int query = (Shape::kParts == 1 ? 0 : warpgroup * 64) + warp_id() % 4 * 16 + lane / 4;
  const int group = (Shape::kParts == 1 ? warpgroup * 4 : 0) + lane % 4;
  Found* records = reinterpret_cast<Found*>(memory);
  records[query * kGroups + group] = found[0];
  records[(query + 8) * kGroups + group] = found[1];
  __syncthreads();
  resolve_all<T, Shape::kQueries>(p, slice, {kGroups, 2, 2 * kGroups}, records);
  return largest;
}

}  // namespace grace::cuda
