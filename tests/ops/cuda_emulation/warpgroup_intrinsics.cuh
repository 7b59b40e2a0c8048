// Stand-in for csrc/cuda/warpgroup_intrinsics.cuh: the same kernels, on a CPU.
//
// Products are computed when they are waited for, as late as may be. That nothing of what they read
// has changed since they were started, and that they could see it then, is checked; until then
// their sums are NaN.
#pragma once

#include <intrinsics.cuh>

#include <algorithm>
#include <limits>
#include <vector>

#define GRACE_HAS_WARPGROUPS

namespace grace::cuda {

inline char* swizzled_shared() { return emulation::block().memory; }

inline void start_barrier(uint64_t* barrier, unsigned arrivals) {
  emulation::block().start_barrier(barrier, arrivals);
}
inline void arrive(uint64_t* barrier) { emulation::block().arrive(barrier); }
inline void wait_for(uint64_t* barrier, unsigned phase) {
  emulation::block().wait_for(barrier, phase);
}
inline void publish_to_products() { emulation::block().publish(); }

template <int Registers>
void give_registers_up() {}
template <int Registers>
void take_registers() {}

inline uint64_t matrix(const void* shared, int stride) {
  const uint64_t at = static_cast<const char*>(shared) - emulation::block().memory;
  if (at % 1024 != 0 || stride % 1024 != 0) emulation::broken("a matrix at an odd place");
  return uint64_t{1} << 62 | static_cast<uint64_t>(stride / 16) << 32 | uint64_t{1} << 16 | at / 16;
}
constexpr uint64_t kNextProduct = 2;

// 16 bytes, elements 8 part + {0..7}, of a row of a matrix.
inline const char* part_of(uint64_t matrix, int row, int part) {
  const uint64_t stride = (matrix >> 32 & 0x3fff) * 16;
  const uint64_t at = (matrix & 0x3fff) * 16 + row / 8 * stride + row % 8 * 128 + part * 16;
  return emulation::block().memory + (at ^ (at >> 7 & 7) << 4);
}

inline void begin_products() { emulation::block().current().may_multiply = true; }
inline void commit_products() {
  emulation::Fiber& fiber = emulation::block().current();
  fiber.committed = fiber.products.size();
}

// What a product of 64 rows and `columns` reads.
inline std::vector<char> read_by(const emulation::Product& product, int columns) {
  std::vector<char> bytes;
  for (int row = 0; row < 64 + columns; ++row) {
    for (int part = 0; part < 2; ++part) {
      const char* from =
          row < 64 ? part_of(product.a, row, part) : part_of(product.b, row - 64, part);
      if (emulation::block().unpublished.at((from - emulation::block().memory) / 16)) {
        emulation::broken("a product of what was not published to products");
      }
      bytes.insert(bytes.end(), from, from + 16);
    }
  }
  return bytes;
}

// One step, `sums` of 64 rows and N columns. Most of the time goes by here.
template <class T, int N>
#ifdef __GNUC__
__attribute__((optimize("O3")))
#endif
void multiply_now(const std::vector<char>& read, bool more, std::vector<float>& sums) {
  double a[64][16], b[16][N];
  const auto widened = [&](int row, int i) {
    T element;
    std::memcpy(&element, read.data() + row * 32 + i * 2, 2);
    return static_cast<double>(widen(element));
  };
  for (int i = 0; i < 16; ++i) {
    for (int row = 0; row < 64; ++row) a[row][i] = widened(row, i);
    for (int row = 0; row < N; ++row) b[i][row] = widened(64 + row, i);
  }
  for (int row = 0; row < 64; ++row) {
    float* d = &sums[row * N];
    double sum[N], size[N];
    for (int column = 0; column < N; ++column) {
      sum[column] = more ? d[column] : 0.0;
      size[column] = std::fabs(sum[column]);
    }
    for (int i = 0; i < 16; ++i) {
      for (int column = 0; column < N; ++column) {
        const double product = a[row][i] * b[i][column];
        sum[column] += product;
        size[column] += std::fabs(product);
      }
    }
    for (int column = 0; column < N; ++column) {
      d[column] = emulation::step_of_mma(sum[column], size[column], column);
    }
  }
}

template <class T, int R>
void multiply(T, float (&d)[R], uint64_t a, uint64_t b, int more) {
  emulation::Block& block = emulation::block();
  emulation::Fiber& fiber = block.current();
  if (!fiber.may_multiply) emulation::broken("products without begin_products()");
  if (!more && !fiber.products.empty()) emulation::broken("sums that are thrown away");
  if (more && fiber.products.empty()) emulation::broken("sums that go on are not emulated");
  fiber.products.push_back({a, b, more != 0});
  fiber.sums = d;
  std::fill(d, d + R, std::numeric_limits<float>::quiet_NaN());
  std::vector<std::vector<char>>& read = block.warpgroups[threadIdx.x / 128].read;
  if (threadIdx.x % 128 == 0) read.push_back(read_by(fiber.products.back(), R * 2));
  fiber.multiply = [](const std::vector<char>& bytes, bool more, std::vector<float>& sums) {
    multiply_now<T, R * 2>(bytes, more, sums);
  };
}

template <int R>
void wait_for_products(float (&)[R]) {
  constexpr int kColumns = R * 2;
  emulation::Block& block = emulation::block();
  const emulation::Fiber& mine = block.current();
  if (mine.committed != mine.products.size()) emulation::broken("products not committed");
  block.meet([&] {
    const unsigned first = threadIdx.x / 128 * 128;
    const std::vector<emulation::Product> products = block.fibers[first].products;
    std::vector<std::vector<char>>& read = block.warpgroups[first / 128].read;
    std::vector<float> sums(64 * kColumns);
    for (size_t i = 0; i < products.size(); ++i) {
      const emulation::Product& product = products[i];
      if (read_by(product, kColumns) != read[i]) {
        emulation::broken("shared memory changed while it was multiplied");
      }
      block.fibers[first].multiply(read[i], product.more, sums);
    }
    for (unsigned t = first; t < first + 128; ++t) {
      emulation::Fiber& fiber = block.fibers[t];
      if (fiber.products.size() != products.size()) {
        emulation::broken("a product that only some threads of a warpgroup ask for");
      }
      for (size_t i = 0; i < products.size(); ++i) {
        if (fiber.products[i] != products[i]) emulation::broken("different products");
      }
      const int lane = t % 32, top = t % 128 / 32 * 16 + lane / 4;
      for (int r = 0; r < R; ++r) {
        const int row = top + r / 2 % 2 * 8, column = r / 4 * 8 + lane % 4 * 2 + r % 2;
        fiber.sums[r] = sums[row * kColumns + column];
      }
      fiber.products.clear();
      fiber.committed = 0;
      fiber.may_multiply = false;
    }
    read.clear();
  });
}

}  // namespace grace::cuda
