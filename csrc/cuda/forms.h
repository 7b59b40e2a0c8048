// Forms of the kernels that have never run on a GPU. Each is off unless it is asked for, by
// GRACE_KERNELS_CUDA_FORMS or by a test, until a measurement gives it a row in kernels.h:
//
//   exact         canonical distances from the start where fp64 is cheap, lookup_exact.cuh
//   exact-always  the same wherever it can run, whether it should pay or not
//   apart         answers in a launch of their own, lookup_apart.cuh
//   rows          few wide rows to a slice are scanned on CUDA cores for up to 16 queries
//   coordinates   sketches of queries in a launch of their own, lookup_coordinates.cuh; besides a
//                 slice gives its sketch up after one query that left too much, not after eight
//   warpgroups    more than 16 fp16 or bf16 queries by warpgroups on sm_90a, lookup_warpgroups.cuh;
//                 more than 64 are then answered apart, too
//   dependent     the second launch of apart and coordinates begins before the first has ended, from
//                 compute capability 9.0 on (programmatic dependent launch)
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace grace::cuda {

enum Form : unsigned {
  kFormExact = 1,
  kFormExactAlways = 2,
  kFormApart = 4,
  kFormRows = 8,
  kFormCoordinates = 16,
  kFormWarpgroups = 32,
  kFormDependent = 64,
};

struct FormName {
  const char* name;
  unsigned form;
};
constexpr FormName kFormNames[] = {{"exact", kFormExact},
                                   {"exact-always", kFormExactAlways},
                                   {"apart", kFormApart},
                                   {"rows", kFormRows},
                                   {"coordinates", kFormCoordinates},
                                   {"warpgroups", kFormWarpgroups},
                                   {"dependent", kFormDependent}};

// Of names with commas between them.
inline unsigned forms_of(const std::string& names) {
  unsigned forms = 0;
  for (size_t at = 0; at < names.size();) {
    const size_t end = std::min(names.find(',', at), names.size());
    const std::string name = names.substr(at, end - at);
    at = end + 1;
    unsigned form = 0;
    std::string known;
    for (const FormName& other : kFormNames) {
      if (name == other.name) form = other.form;
      known += (known.empty() ? "" : ", ") + std::string(other.name);
    }
    if (form == 0) {
      throw std::invalid_argument("GRACE_KERNELS_CUDA_FORMS must be some of " + known + ", got " +
                                  name);
    }
    forms |= form;
  }
  return forms;
}

inline std::atomic<int64_t>& forms_chosen() {
  static std::atomic<int64_t> chosen{-1};  // the environment has not been asked yet
  return chosen;
}

inline unsigned forms_in_use() {
  int64_t forms = forms_chosen().load(std::memory_order_relaxed);
  if (forms < 0) {
    const char* names = std::getenv("GRACE_KERNELS_CUDA_FORMS");
    forms = forms_of(names == nullptr ? "" : names);
    forms_chosen().store(forms, std::memory_order_relaxed);
  }
  return static_cast<unsigned>(forms);
}

}  // namespace grace::cuda
