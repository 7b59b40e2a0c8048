#include "isa.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "../operators.h"

namespace grace::cpu {
namespace {

// What this machine and its operating system can run, the one in use unless another is asked for
// first.
const std::vector<const Kernels*>& runnable() {
  static const std::vector<const Kernels*> all = [] {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();  // reads cpuid, and xgetbv for the registers that the system saves
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      found.push_back(&kAvx512);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
      found.push_back(&kAvx2);
    }
#endif
    found.push_back(&kBaseline);
    return found;
  }();
  return all;
}

std::string names() {
  std::string result;
  for (const Kernels* kernels : runnable()) {
    if (!result.empty()) result += ",";
    result += kernels->name;
  }
  return result;
}

const Kernels* by_name(const char* argument, const std::string& name) {
  for (const Kernels* kernels : runnable()) {
    if (name == kernels->name) return kernels;
  }
  throw std::invalid_argument(std::string(argument) + " must be one of " + names() +
                              " on this machine, got " + name);
}

std::atomic<const Kernels*> chosen{nullptr};

std::string isa() { return chosen_kernels().name; }

void use_isa(std::string name) { chosen = by_name("isa", name); }

}  // namespace

const Kernels& chosen_kernels() {
  const Kernels* kernels = chosen.load(std::memory_order_acquire);
  if (kernels == nullptr) {
    const char* name = std::getenv("GRACE_KERNELS_ISA");
    kernels =
        name == nullptr || *name == '\0' ? runnable().front() : by_name("GRACE_KERNELS_ISA", name);
    chosen.store(kernels, std::memory_order_release);
  }
  return *kernels;
}

STABLE_TORCH_LIBRARY_IMPL(GRACE_CPU_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("isas", TORCH_BOX(&names));
  m.impl("use_isa", TORCH_BOX(&use_isa));
}

}  // namespace grace::cpu
