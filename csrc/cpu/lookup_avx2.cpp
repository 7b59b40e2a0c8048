// The lookup kernel for AVX2 + FMA + F16C.
//
// Every header comes before the target changes, so that no inline function of theirs is compiled
// for AVX2 and then, picked by the linker, run on a machine without it.
#include "lookup_kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace grace::cpu {
namespace avx2 {
namespace {

struct Half;
struct BFloat;

struct Isa {
  using V = __m256;
  static constexpr int64_t width = 8;
  static constexpr int64_t product_batch = 7, product_rest = 5;  // queries, measured
  static constexpr int product_keys = 12, product_panels = 1;

  static V zero() { return _mm256_setzero_ps(); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static V load(const Half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static V load(const BFloat* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static V load(const int8_t* p) {
    return _mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  // 32 elements; bfloat16 in whatever order is fastest.
  template <class T>
  static void load_line(const T* p, V (&v)[32 / width]) {
    for (int i = 0; i < 32 / width; ++i) v[i] = load(p + i * width);
  }
  static void load_line(const BFloat* p, V (&v)[4]) {
    for (int i = 0; i < 2; ++i) {
      const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i);
      v[2 * i] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
      v[2 * i + 1] = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-65536)));
    }
  }
  // Which of the elements of a row that load_line() puts at i.
  static int64_t from(int64_t i) { return i / 16 * 16 + i % 8 * 2 + i / 8 % 2; }
  static V every(float v) { return _mm256_set1_ps(v); }
  static V larger(V a, V b) { return _mm256_max_ps(a, b); }
  // A bit per element; false for a NaN.
  static int above(V a, V b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
  static V add_product(V sum, V a, V b) { return _mm256_fmadd_ps(a, b, sum); }
  static V add_square(V sum, V difference) { return _mm256_fmadd_ps(difference, difference, sum); }
  static float sum(V v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  // Element i % (width / 8) of p in lane i.
  static V spread(const float* p) { return _mm256_broadcast_ss(p); }
  // Add width / 8 neighbours of v to each of 8 numbers.
  static void fold(V v, float* out) { store(out, _mm256_add_ps(load(out), v)); }
  // Otherwise GCC loads a query again for every key.
  static void keep(V& v) { asm("" : "+x"(v)); }
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
};

#include "lookup_kernel_body.h"
#include "product_kernel_body.h"
#include "sketch_kernel_body.h"

}  // namespace
}  // namespace avx2

const Kernels kAvx2 = {
    "avx2",       avx2::prepare, avx2::arrange, avx2::Isa::product_batch, avx2::scan, avx2::finish,
    avx2::sketch, avx2::filter,  avx2::score,   avx2::consider,
};

}  // namespace grace::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
