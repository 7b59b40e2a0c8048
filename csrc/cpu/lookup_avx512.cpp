// The lookup kernel for AVX-512 (F, BW, DQ, VL), with FMA and F16C.
//
// Every header comes before the target changes, so that no inline function of theirs is compiled
// for AVX-512 and then, picked by the linker, run on a machine without it.
#include "lookup_kernel.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC warns of its own _mm512_undefined_*(), which are meant to be uninitialized.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif

namespace grace::cpu {
namespace avx512 {
namespace {

struct Half;
struct BFloat;

struct Isa {
  using V = __m512;
  static constexpr int64_t width = 16;
  static constexpr int64_t product_batch = 6, product_rest = 1;  // queries, measured
  static constexpr int product_keys = 12, product_panels = 2;

  static V zero() { return _mm512_setzero_ps(); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static V load(const Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static V load(const BFloat* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static V load(const int8_t* p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  // 32 elements; bfloat16 in whatever order is fastest.
  template <class T>
  static void load_line(const T* p, V (&v)[32 / width]) {
    for (int i = 0; i < 32 / width; ++i) v[i] = load(p + i * width);
  }
  static void load_line(const BFloat* p, V (&v)[2]) {
    const __m512i pairs = _mm512_loadu_si512(p);
    v[0] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    v[1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)));
  }
  // Which of the elements of a row load_line() puts at i.
  static int64_t from(int64_t i) { return i / 32 * 32 + i % 16 * 2 + i / 16 % 2; }
  static V every(float v) { return _mm512_set1_ps(v); }
  static V larger(V a, V b) { return _mm512_max_ps(a, b); }
  // A bit per element; false for a NaN.
  static int above(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static V add_product(V sum, V a, V b) { return _mm512_fmadd_ps(a, b, sum); }
  static V add_square(V sum, V difference) { return _mm512_fmadd_ps(difference, difference, sum); }
  static float sum(V v) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  // Element i % (width / 8) of p in lane i.
  static V spread(const float* p) {
    double pair;
    std::memcpy(&pair, p, sizeof pair);
    return _mm512_castpd_ps(_mm512_set1_pd(pair));
  }
  // Add width / 8 neighbours of v to each of 8 numbers.
  static void fold(V v, float* out) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14);
    const V sums = _mm512_permutexvar_ps(even, _mm512_add_ps(v, _mm512_movehdup_ps(v)));
    _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), _mm512_castps512_ps256(sums)));
  }
  // Otherwise GCC loads a query again for every key.
  static void keep(V& v) { asm("" : "+v"(v)); }
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
};

#include "lookup_kernel_body.h"
#include "product_kernel_body.h"
#include "sketch_kernel_body.h"

}  // namespace
}  // namespace avx512

const Kernels kAvx512 = {
    "avx512",      avx512::prepare,  avx512::arrange, avx512::Isa::product_batch,
    avx512::scan,  avx512::finish,   avx512::sketch,  avx512::filter,
    avx512::score, avx512::consider,
};

}  // namespace grace::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
