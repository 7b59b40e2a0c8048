// Reading every key.
#include "search_base.h"

namespace grace::cpu {

void find_nearest(const Codebook& codebook, const Asking& asking, bool bounded, int64_t* index,
                  float* distance) {
  DefaultFloatingPoint guard;
  Search(codebook, asking, bounded, index, distance).run();
}

}  // namespace grace::cpu
