// The kernels for bfloat16 keys. A file for each type, since compiling them takes most of the time.
#include <intrinsics.cuh>

#include "kernels.h"

namespace grace::cuda {

template Kernel choose<BFloat>(const Asked&, unsigned);
template Kernel apart<BFloat>();
template Kernel coordinates<BFloat>();

}  // namespace grace::cuda
