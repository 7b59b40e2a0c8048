// Stand-in for csrc/cuda/intrinsics.cuh: the same kernels, on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __forceinline__ inline
#define __host__
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (emulation::block().thread_index)
#define blockIdx (emulation::block().block_index)
#define gridDim (emulation::block().grid_dim)

inline void __syncthreads() { emulation::block().barrier(); }
inline void __threadfence() {}
inline unsigned atomicInc(unsigned* at, unsigned most) {
  const unsigned old = *at;
  *at = old >= most ? 0 : old + 1;
  return old;
}
inline unsigned atomicAdd(unsigned* at, unsigned more) {
  const unsigned old = *at;
  *at += more;
  return old;
}
using Word = unsigned long long;
inline Word atomicAdd(Word* at, Word more) {
  const Word old = *at;
  *at += more;
  return old;
}
inline Word atomicMin(Word* at, Word other) {
  const Word old = *at;
  if (other < old) *at = other;
  return old;
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned from = selector >> (4 * i) & 7;
    out |= static_cast<uint32_t>(bytes >> (8 * from) & 0xff) << (8 * i);
  }
  return out;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __double2float_rn(double v) {  // each lane's last step in scoring a pair
  if (threadIdx.x % 32 == 0) ++emulation::controls().scored;
  return static_cast<float>(v);
}
inline float __double2float_ru(double v) {
  const float f = static_cast<float>(v);
  return f < v ? std::nextafterf(f, INFINITY) : f;
}
inline float __fsqrt_rn(float v) { return std::sqrt(v); }

namespace grace::cuda {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

inline float widen(float value) { return value; }
inline float widen(BFloat value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}
inline float widen(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const int exponent = value.bits >> 10 & 31, fraction = value.bits & 0x3ff;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  const float magnitude = exponent == 0
                              ? std::ldexp(static_cast<float>(fraction), -24)
                              : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return sign != 0 ? -magnitude : magnitude;
}

inline uint32_t round_to_bfloats(float first, float second) {
  const auto rounded = [](float value) {
    const uint32_t bits = __float_as_uint(value);
    return std::isnan(value) ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  };
  return rounded(first) | rounded(second) << 16;
}

inline char* dynamic_shared() { return emulation::block().memory; }

inline void must_be_aligned(const void* at) {
  if (reinterpret_cast<uintptr_t>(at) % 16 != 0) emulation::broken("16 bytes at an odd address");
}

inline uint4 load16(const void* from) {
  must_be_aligned(from);
  uint4 v;
  std::memcpy(&v, from, 16);
  return v;
}

inline uint4 load16_of_others(const void* from) { return load16(from); }

// A copy takes place when it is waited for, and spoils its target before.
inline void copy16(void* shared, const void* global) {
  must_be_aligned(shared);
  must_be_aligned(global);
  std::memset(shared, emulation::kPoison, 16);
  emulation::block().current().issued.push_back({shared, global});
}
inline void commit_copies() {
  emulation::Fiber& fiber = emulation::block().current();
  fiber.groups.push_back(std::move(fiber.issued));
  fiber.issued.clear();
}
template <int N>
void wait_for_copies() {
  auto& groups = emulation::block().current().groups;
  while (groups.size() > N) {
    for (const emulation::Copy& copy : groups.front()) {
      std::memcpy(copy.to, copy.from, 16);
      emulation::block().copied(copy.to);
    }
    groups.erase(groups.begin());
  }
}

inline void let_dependents_start() {}
inline void wait_for_launch_before() { emulation::block().wait_for_launch_before(); }
inline void prefetch(const void* global) {  // it must be there
  static_cast<void>(*static_cast<const volatile char*>(global));
}

template <class V>
V shuffle(V value, int lane) {
  return emulation::block().exchange(value, "shuffle", [lane](int) { return lane; });
}
template <class V>
V shuffle_xor(V value, int mask) {
  return emulation::block().exchange(value, "shuffle", [mask](int lane) { return lane ^ mask; });
}
inline unsigned ballot(bool predicate) {
  unsigned all = 0;
  emulation::block().gather(&predicate, 1, "ballot", [&](char (*slots)[32], int) {
    for (int lane = 0; lane < 32; ++lane) all |= static_cast<unsigned>(slots[lane][0] != 0) << lane;
  });
  return all;
}

inline void converge() { ballot(true); }

// What a lane brings to mma: row g = lane / 4, columns 2 (lane % 4) + {0, 1} and those plus 8, of a
// and of b transposed; a holds row g + 8 as well.
struct Fragments {
  uint32_t a[4], b[2];
};

inline void load_matrices(const void* shared, uint32_t (&to)[4]) {
  must_be_aligned(shared);
  emulation::block().gather(&shared, sizeof shared, "ldmatrix", [&](char (*slots)[32], int lane) {
    for (int i = 0; i < 4; ++i) {
      const char* row;
      std::memcpy(&row, slots[i * 8 + lane / 4], sizeof row);
      std::memcpy(&to[i], row + lane % 4 * 4, 4);
    }
  });
}

// Sums exactly, then errs by up to controls().mma_error of the sum of |products| and |accumulator|.
template <class T>
void mma(T, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const Fragments mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulation::block().gather(&mine, sizeof mine, "mma", [&](char (*slots)[32], int lane) {
    const auto of = [&](int other) { return reinterpret_cast<const Fragments*>(slots[other]); };
    const auto element = [](uint32_t word, int i) {
      return static_cast<double>(widen(T{static_cast<uint16_t>(word >> (16 * i))}));
    };
    for (int r = 0; r < 4; ++r) {
      const int row = lane / 4, upper = r / 2, column = lane % 4 * 2 + r % 2;
      double sum = d[r], size = std::fabs(d[r]);
      for (int quad = 0; quad < 4; ++quad) {
        const Fragments* a = of(row * 4 + quad);
        const Fragments* b = of(column * 4 + quad);
        for (int half = 0; half < 2; ++half) {
          for (int i = 0; i < 2; ++i) {
            const double product = element(a->a[half * 2 + upper], i) * element(b->b[half], i);
            sum += product;
            size += std::fabs(product);
          }
        }
      }
      d[r] = emulation::step_of_mma(sum, size, column);
    }
  });
}

}  // namespace grace::cuda
