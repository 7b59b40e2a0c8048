// What the lookups of csrc/cpu use of torch's header of this name, with one thread.
#pragma once

#include <cstdint>

namespace torch::stable {

inline uint32_t get_num_threads() { return 1; }

template <class Work>
void parallel_for(int64_t begin, int64_t end, int64_t, const Work& work) {
  work(begin, end);
}

}  // namespace torch::stable
