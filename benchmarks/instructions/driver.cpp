// Answers one case and nothing else, without torch, so that its instructions can be counted.
//
// driver FILE prints the instruction set, then per query its index and the bits of its distance.
// FILE holds 12 int64: N, D, B, rows covered by a sketch (0: none, and `nearest` is asked), and
// where in the file these lie: keys `[N, D]` and queries `[B, D]` bfloat16, radii `[N]`, and of the
// sketch centre, directions, scales, head and tail, see grace_kernels/sketch.py.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "isa.h"
#include "search.h"

namespace grace::cpu {

// The best that valgrind knows too.
const Kernels& chosen_kernels() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return kAvx2;
  }
#endif
  return kBaseline;
}

}  // namespace grace::cpu

int main(int arguments, char** argument) {
  using namespace grace::cpu;
  const int file = arguments == 2 ? open(argument[1], O_RDONLY) : -1;
  struct stat about;
  if (file < 0 || fstat(file, &about) != 0) {
    std::fprintf(stderr, "driver must be given one file that can be read\n");
    return 2;
  }
  const void* mapped = mmap(nullptr, about.st_size, PROT_READ, MAP_PRIVATE, file, 0);
  if (mapped == MAP_FAILED) return 2;
  const int64_t* said = static_cast<const int64_t*>(mapped);
  const int64_t n = said[0], dim = said[1], batch = said[2], covered = said[3];
  const auto part = [&](int i) { return static_cast<const char*>(mapped) + said[4 + i]; };
  const auto floats = [&](int i) { return reinterpret_cast<const float*>(part(i)); };
  const auto bytes = [&](int i) { return reinterpret_cast<const int8_t*>(part(i)); };

  const Codebook codebook{part(0), dim, Dtype::kBFloat16, dim, floats(2), n};
  const Asking asking{part(1), 2 * dim, batch, nullptr};
  std::vector<int64_t> index(batch);
  std::vector<float> distance(batch);
  if (covered == 0) {
    find_nearest(codebook, asking, false, index.data(), distance.data());
  } else {
    int64_t counters[4] = {};
    const Codes codes{
        floats(3), reinterpret_cast<const uint16_t*>(part(4)), dim, floats(5), bytes(6), bytes(7)};
    find_pruned(codebook, Sketch{codes, covered, counters}, asking, index.data(), distance.data());
  }
  std::printf("%s\n", chosen_kernels().name);
  for (int64_t b = 0; b < batch; ++b) {
    int32_t bits;
    std::memcpy(&bits, &distance[b], sizeof bits);
    std::printf("%" PRId64 " %" PRId32 "\n", index[b], bits);
  }
}
