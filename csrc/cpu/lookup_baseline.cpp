// The lookup kernel in what every compiler's default target has (SSE2 on x86-64, NEON on ARM).
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "lookup_kernel.h"

namespace grace::cpu {
namespace baseline {
namespace {

struct Half;
struct BFloat;

struct Isa {
  typedef float V __attribute__((vector_size(32)));
  typedef uint32_t U __attribute__((vector_size(32)));
  typedef uint16_t H __attribute__((vector_size(16)));

  static constexpr int64_t width = 8;
  // Never: no faster than differences with SSE2; not measured elsewhere.
  static constexpr int64_t product_batch = kMostQueries + 1, product_rest = 0;
  static constexpr int product_keys = 6, product_panels = 1;

  static V zero() { return V{}; }
  static V load(const float* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
  static U load_bits(const void* p) {
    H h;
    std::memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, U);
  }
  static V load(const BFloat* p) { return (V)(load_bits(p) << 16); }
  static V load(const Half* p) {  // see widen(Half)
    const U bits = load_bits(p);
    const U magnitude = (bits & 0x7fff) << 13;
    const U special = (U)((bits & 0x7c00) == 0x7c00);
    const U scaled = (U)((V)magnitude * 0x1p112f);
    const U result = (special & (magnitude | 0x7f800000)) | (~special & scaled);
    return (V)(result | ((bits & 0x8000) << 16));
  }
  static V load(const int8_t* p) {
    typedef int8_t B __attribute__((vector_size(8)));
    B b;
    std::memcpy(&b, p, sizeof b);
    return __builtin_convertvector(b, V);
  }
  // 32 elements; bfloat16 in whatever order is fastest.
  template <class T>
  static void load_line(const T* p, V (&v)[32 / width]) {
    for (int i = 0; i < 32 / width; ++i) v[i] = load(p + i * width);
  }
  static int64_t from(int64_t i) { return i; }
  static V every(float v) { return V{} + v; }
  static V larger(V a, V b) { return a > b ? a : b; }
  // A bit per element; false for a NaN.
  static int above(V a, V b) {
    const auto greater = a > b;
    int bits = 0;
    for (int i = 0; i < 8; ++i) bits |= (greater[i] & 1) << i;
    return bits;
  }
  static V add_product(V sum, V a, V b) { return sum + a * b; }
  static V add_square(V sum, V difference) { return sum + difference * difference; }
  static float sum(V v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
  }
  // Element i % (width / 8) of p in lane i.
  static V spread(const float* p) { return every(*p); }
  // Add width / 8 neighbours of v to each of 8 numbers.
  static void fold(V v, float* out) { store(out, load(out) + v); }
  static void keep(V&) {}
  static void prefetch(const void* p) { __builtin_prefetch(p); }
};

#include "lookup_kernel_body.h"
#include "product_kernel_body.h"
#include "sketch_kernel_body.h"

}  // namespace
}  // namespace baseline

const Kernels kBaseline = {
    "baseline",      baseline::prepare,  baseline::arrange, baseline::Isa::product_batch,
    baseline::scan,  baseline::finish,   baseline::sketch,  baseline::filter,
    baseline::score, baseline::consider,
};

}  // namespace grace::cpu
